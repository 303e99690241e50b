"""What is imported from where, what importing costs, and what the wheel holds."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from quantcache import data

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "quantcache"

TIERS = (
    ("errors", "jsonfile", "packing", "rope", "spectral", "codebook", "data", "passes", "processes", "transaction"),
    ("schema", "store", "guards", "index", "rows", "spans", "tensor_file", "writing"),
    ("allocation", "compat", "card", "passages", "hub"),
    ("artifact_files", "accounting"),
    ("artifact",),
    ("codec",),
    ("lazy", "online_softmax", "distortion"),
    ("backends",),
    ("attention",),
    ("layer",),
    ("cache_files", "calibrated_codecs", "consistency"),
    ("cache", "probe", "statistics", "self_calibration"),
    ("yardstick",),
    ("calibration", "enabling"),
    ("export", "recipes"),
    ("evaluation", "env"),
    ("analysis",),
    ("planning",),
    ("demo",),
    ("cli", "__init__", "__main__"),
)
RANK = {module: rank for rank, tier in enumerate(TIERS) for module in tier}


def run_python(code: str) -> str:
    """Run code in a fresh interpreter at the repository root and return what it prints."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def imported_modules(source: Path) -> set[str]:
    """What a file imports from quantcache at run time, down to top-level modules and names, in functions too."""
    found = set()
    tree = ast.parse(source.read_text(encoding="utf-8"))
    typing_only = [n for n in ast.walk(tree) if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
    skipped = {id(n) for block in typing_only for n in ast.walk(block)}
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{source} has a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            package, _, rest = name.partition(".")
            if package == "quantcache" and rest != "__version__":
                found.add(rest.split(".")[0] or "__init__")
    return found


def modules() -> list[tuple[str, Path]]:
    """Every source file of quantcache with the name of its top-level module."""
    return sorted((path.relative_to(PACKAGE).parts[0].removesuffix(".py"), path) for path in PACKAGE.rglob("*.py"))


@pytest.mark.parametrize(("module", "path"), [pytest.param(*m, id=str(m[1].relative_to(PACKAGE))) for m in modules()])
def test_imports_go_one_way(module: str, path: Path) -> None:
    assert module in RANK, f"add {module} to TIERS"
    # A name of the package itself, such as SpectralCache, ranks with the package: the last tier.
    too_high = {name for name in imported_modules(path) if RANK.get(name, RANK["__init__"]) > RANK[module]}
    assert not too_high, f"{module} imports from later tiers: {sorted(too_high)}"


def test_kernels_do_not_import_quantcache() -> None:
    for path in (ROOT / "kernels" / "quantcache_kernels").rglob("*.py"):
        assert not imported_modules(path), f"{path} imports quantcache"


def test_kernels_folder_is_not_a_package() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_kernels_folder_does_not_shadow_the_kernels_package() -> None:
    origin = run_python(
        "try:\n    import kernels\nexcept ImportError:\n    print()\nelse:\n    print(kernels.__file__ or '')"
    )
    assert origin == "" or (ROOT / "kernels") not in Path(origin).parents


def test_import_is_light() -> None:
    assert run_python("import sys, quantcache; print('matplotlib' in sys.modules)") == "False"


def test_import_brings_no_triton_of_its_own() -> None:
    # transformers may import triton where it is installed; quantcache must work where it is not.
    code = "import sys; sys.modules['triton'] = None; import quantcache, quantcache_kernels; print('ok')"
    assert run_python(code) == "ok"


def test_bundled_texts_are_disjoint() -> None:
    calibration, evaluation = (
        {article.strip() for article in text.split("\n\n\n")} - {""}
        for text in (data.calibration_text(), data.evaluation_text())
    )
    assert len(calibration) == 22
    assert len(evaluation) == 8
    assert not calibration & evaluation
    assert not {a.split("\n")[0] for a in calibration} & {a.split("\n")[0] for a in evaluation}


def test_missing_data_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(data, "files", lambda package: tmp_path)
    with pytest.raises(FileNotFoundError, match=r"bundled data is missing: .*model\.safetensors"):
        data.demo_model_path()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel, built from a copy so that nothing stale of an earlier build gets in or is left behind."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("quantcache", "kernels"):
        shutil.copytree(ROOT / name, source / name)
    build = "import setuptools.build_meta as backend; backend.build_wheel('dist')"
    result = subprocess.run([sys.executable, "-c", build], cwd=source, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    (path,) = (source / "dist").glob("*.whl")
    return zipfile.ZipFile(path)


def test_wheel_holds_both_packages_and_the_data(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    sources = {path.relative_to(ROOT).as_posix() for path in PACKAGE.rglob("*.py")}
    kernels = ROOT / "kernels"
    sources |= {path.relative_to(kernels).as_posix() for path in (kernels / "quantcache_kernels").rglob("*.py")}
    assert sources <= names
    assert {
        "quantcache/py.typed",
        "quantcache/data/wiki11m/config.json",
        "quantcache/data/wiki11m/model.safetensors",
        "quantcache/data/wiki11m/tokenizer.json",
        "quantcache/data/wiki11m/README.md",
        "quantcache/data/measurements.json",
        "quantcache/data/calibrations/index.json",
        "quantcache/data/calibrations/recipes/wiki11m.yaml",
        "quantcache/data/calibrations/wiki11m/calibration.safetensors",
        "quantcache/data/calibrations/wiki11m/calibration_config.json",
        "quantcache/data/texts/wiki_calibration.txt",
        "quantcache/data/texts/wiki_evaluation.txt",
        "quantcache/data/texts/NOTICE.md",
        "quantcache_kernels/__init__.py",
    } <= names


def test_wheel_holds_nothing_else(wheel: zipfile.ZipFile) -> None:
    names = wheel.namelist()
    top = {name.split("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"quantcache", "quantcache_kernels"}
    assert not [name for name in names if "__pycache__" in name]
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_the_map_of_the_source_is_whole() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    missing = {module for module, _ in modules() if not module.startswith("__")} - set(re.findall(r"`(\w+)`", page))
    assert not missing, f"docs/architecture.md does not name {sorted(missing)}"
