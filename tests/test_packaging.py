"""What is imported from where, what importing costs, and what the wheel holds."""

from __future__ import annotations

import ast
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AttentionMaskInterface
from transformers.masking_utils import bidirectional_mask_function

import quantcache
from quantcache import data
from quantcache.attention.function import spectral_mask
from quantcache.common import registration
from tests import conftest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "quantcache"
TOP_LEVEL = (
    "README.md",
    "LICENSE",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "Makefile",
    "constraints.txt",
    "constraints-floor.txt",
)

PACKAGES = (
    "data",
    "common",
    "coding",
    "accounting",
    "artifact",
    "backends",
    "attention",
    "cache",
    "calibration",
    "export",
    "evaluation",
    "analysis",
    "planning",
    "cli",
)
"""Folders of quantcache: each imports from those before it only."""

RANK = {package: rank for rank, package in enumerate(PACKAGES)} | {"__init__": len(PACKAGES), "__main__": len(PACKAGES)}


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
    """The packages that a file imports from at run time, in functions too, and names of the package itself."""
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
    """Every source file of quantcache with its package."""
    return sorted((path.relative_to(PACKAGE).parts[0].removesuffix(".py"), path) for path in PACKAGE.rglob("*.py"))


@pytest.mark.parametrize(("module", "path"), [pytest.param(*m, id=str(m[1].relative_to(PACKAGE))) for m in modules()])
def test_imports_go_one_way(module: str, path: Path) -> None:
    # A name of the package itself, such as SpectralCache, ranks with the package: only the command line uses those.
    rank = RANK[module] + (module == "cli")
    too_high = {name for name in imported_modules(path) if RANK.get(name, RANK["__init__"]) > rank}
    assert not too_high, f"{module} imports from later packages: {sorted(too_high)}"


def test_the_maths_knows_no_models() -> None:
    for path in (PACKAGE / "coding").rglob("*.py"):
        imports = [
            n for n in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(n, ast.Import | ast.ImportFrom)
        ]
        assert not [n for n in imports if "transformers" in ast.unparse(n)], f"{path} imports transformers"


def test_packages_are_all_there_is() -> None:
    found = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert found == set(PACKAGES)
    assert {path.stem for path in PACKAGE.glob("*.py")} == {"__init__", "__main__"}


def test_versions_of_transformers_are_told_apart_in_one_place() -> None:
    telltale = re.compile(
        r"transformers\.__version__|is_transformers_version|version\.parse|hasattr\((cache_utils|transformers)"
    )
    places = {path.relative_to(PACKAGE).parts[:2] for _, path in modules() if telltale.search(path.read_text("utf-8"))}
    assert places == {("common", "compat")}


def test_entry_points_are_there() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    groups = {"scripts": project["scripts"], **project["entry-points"]}
    assert set(groups) == {"scripts", "lm_eval.models"}
    for value in [value for names in groups.values() for value in names.values()]:
        module, _, name = value.partition(":")
        path = ROOT.joinpath(*module.split(".")).with_suffix(".py")
        defined = {node.name for node in ast.parse(path.read_text("utf-8")).body if hasattr(node, "name")}
        assert name in defined, value  # not imported: what it belongs to may not be installed


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
    heavy = ("torch", "transformers.modeling_utils", "matplotlib", "triton")
    assert run_python(f"import sys, transformers, quantcache; print([m for m in {heavy} if m in sys.modules])") == "[]"


def test_help_imports_no_transformers() -> None:
    code = (
        "import sys\nfrom quantcache.cli import main\ntry:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    assert run_python(code).endswith("[]")


@pytest.mark.slow
def test_commands_without_a_model_load_no_models_code() -> None:
    """transformers' model code, and torch's compiler with it, take longer to load than all else together."""
    heavy = ("transformers.modeling_utils", "transformers.generation.utils", "torch._dynamo")
    commands = ("inspect wiki11m", "eval --list-methods", "calibrate --list-recipes")
    code = (
        "import sys\nfrom quantcache.cli import main\n"
        f"for arguments in {commands}:\n"
        "    try:\n        main(arguments.split())\n"
        "    except SystemExit as end:\n        assert not end.code\n"
        f"    print('loaded:', [name for name in {heavy} if name in sys.modules])"
    )
    assert re.findall("loaded: (.*)", run_python(code)) == ["[]"] * len(commands)


def test_every_public_name_can_be_had() -> None:
    assert all(getattr(quantcache, name) is not None for name in quantcache.__all__)
    assert set(quantcache.__all__) <= set(dir(quantcache))
    with pytest.raises(AttributeError, match="no_such_name"):
        quantcache.no_such_name  # noqa: B018


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


@dataclass(frozen=True)
class Build:
    """What a build leaves.

    Attributes:
        wheel: The wheel, without the compiled library.
        sources: Names in the source distribution, below its top folder.
        output: What setuptools printed.
    """

    wheel: zipfile.ZipFile
    sources: set[str]
    output: str


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """Wheel and source distribution, built from a copy: nothing stale of an earlier build gets in or is left behind."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "MANIFEST.in", *TOP_LEVEL):
        shutil.copy(ROOT / name, source)
    unwanted = shutil.ignore_patterns("*.so", "__pycache__", "results", "scratch")
    for name in ("quantcache", "kernels", "docs", "examples", "tests", "benchmarks"):
        shutil.copytree(ROOT / name, source / name, ignore=unwanted)
    environment = {**os.environ, "PYTHONWARNINGS": "default"}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # setuptools says that it obeys
    output = ""
    for kind in ("wheel", "sdist"):  # the wheel without setup.py: compiling takes a minute and has tests of its own
        command = f"import setuptools.build_meta as backend; backend.build_{kind}('dist')"
        result = subprocess.run(
            [sys.executable, "-c", command], cwd=source, env=environment, capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, result.stderr
        output += result.stdout + result.stderr
        shutil.copy(ROOT / "setup.py", source)
    (path,), (archive,) = (source / "dist").glob("*.whl"), (source / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        sources = {name.partition("/")[2] for name in tar.getnames()}
    return Build(zipfile.ZipFile(path), sources, output)


@pytest.fixture(scope="module")
def wheel(build: Build) -> zipfile.ZipFile:
    """The wheel."""
    return build.wheel


@pytest.mark.slow
def test_building_is_silent(build: Build) -> None:
    told = [line for line in build.output.splitlines() if re.search("warning|deprecat|ignored", line, re.IGNORECASE)]
    assert not told


@pytest.mark.slow
def test_the_source_distribution_is_complete(build: Build) -> None:
    wanted = {*TOP_LEVEL, "setup.py", "pyproject.toml", "MANIFEST.in", "kernels/quantcache_kernels/py.typed"}
    for folder in ("quantcache", "kernels", "docs", "examples", "tests"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".h", ".cpp", ".md", ".svg") or "data" in path.relative_to(ROOT).parts[:2]:
                wanted.add(path.relative_to(ROOT).as_posix())
    missing = {name for name in wanted if "__pycache__" not in name and not (ROOT / name).is_dir()} - build.sources
    assert not missing


@pytest.mark.slow
def test_there_is_one_version(build: Build) -> None:
    assert f"quantcache-{quantcache.__version__}.dist-info/METADATA" in build.wheel.namelist()
    released = re.findall(r"^## \[(\d+\.\d+\.\d+)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)
    assert released[0] == quantcache.__version__


@pytest.mark.slow
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
        "quantcache/data/calibrations/smollm2-135m/calibration.safetensors",
        "quantcache/data/calibrations/smollm2-135m/calibration_config.json",
        "quantcache/data/calibrations/qwen2.5-coder-1.5b/calibration.safetensors",
        "quantcache/data/texts/wiki_calibration.txt",
        "quantcache/data/texts/wiki_evaluation.txt",
        "quantcache/data/texts/NOTICE.md",
        "quantcache_kernels/__init__.py",
    } <= names


@pytest.mark.slow
def test_wheel_holds_nothing_else(wheel: zipfile.ZipFile) -> None:
    names = wheel.namelist()
    top = {name.split("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"quantcache", "quantcache_kernels"}
    assert not [name for name in names if "__pycache__" in name]
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_the_map_of_the_source_is_whole() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert set(PACKAGES) <= set(re.findall(r"^\| `(\w+)` \|", page, re.M))
    paths = re.findall(r"`(\w+/\w+\.py)`", page)
    assert paths
    assert not [path for path in paths if not any((base / path).exists() for base in (PACKAGE, ROOT))]


@pytest.mark.slow
def test_attention_is_registered_and_runs_where_nothing_of_quantcache_was_used_yet() -> None:
    code = (
        "import inspect, quantcache, torch\n"
        "from transformers.models.llama import modeling_llama\n"
        "from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM, modeling_utils\n"
        "assert 'def from_pretrained' in inspect.getsource(modeling_utils)\n"
        "assert 'spectral' in AttentionInterface()\n"
        "config = LlamaConfig(num_hidden_layers=1, hidden_size=32, intermediate_size=32, num_attention_heads=2,"
        " num_key_value_heads=1, vocab_size=16, attn_implementation='spectral')\n"
        "model = LlamaForCausalLM(config).eval()\n"
        "ids = torch.ones(1, 3, dtype=torch.long)\n"
        "ours = model(ids).logits\n"
        "model.set_attn_implementation('sdpa')\n"
        "print(torch.equal(ours, model(ids).logits))"
    )
    assert run_python(code).splitlines()[-1] == "True"


def test_the_mask_is_ours_from_the_start() -> None:
    """Before the first call of attention a model that looks ahead got no mask, which attention takes for causal."""
    try:
        registration._register()
        call: dict[str, Any] = {"batch_size": 1, "q_length": 3, "kv_length": 3, "allow_is_causal_skip": False}
        call |= {"mask_function": bidirectional_mask_function, "allow_is_bidirectional_skip": True}
        mask = AttentionMaskInterface()[registration.ATTENTION_NAME](**call)
        assert mask is not None
        assert mask.all()
        assert AttentionMaskInterface()[registration.ATTENTION_NAME] is spectral_mask
    finally:
        quantcache.register_attention()


def test_a_run_says_what_it_ran_on() -> None:
    header = conftest.pytest_report_header()
    for name in ("torch", "transformers", "huggingface_hub", "numpy"):
        assert f"{name} {version(name)}," in header
    assert header.startswith(f"Python {platform.python_version()}, torch ")
    assert ", triton " in header
    cuda = torch.cuda.is_available()
    assert header.endswith(f", on {torch.cuda.get_device_name() if cuda else f'CPU ({platform.machine()})'}")
