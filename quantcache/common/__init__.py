"""What every package uses: errors, versions of transformers, shields against torch's settings, files, the terminal."""
