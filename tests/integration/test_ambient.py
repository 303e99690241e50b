"""What a program has set for all of torch changes nothing: default dtype and device, autocast, inference mode, ..."""

from __future__ import annotations

import ast
import contextlib
import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from quantcache.artifact.calibration import Calibration
from quantcache.attention.function import spectral_attention, spectral_attention_forward
from quantcache.cache.spectral_cache import SpectralCache
from quantcache.calibration.calibrator import calibrate
from quantcache.coding import linalg
from quantcache.coding.schema import SIDES
from quantcache.common import ambient
from tests.builders import llama_config, scalar_calibration
from tests.families import FAMILIES, Family, random_tokens, shared_model
from tests.helpers import few
from tests.kernels import truth

ROOT = Path(__file__).resolve().parent.parent.parent
LLAMA, GEMMA3 = (next(family for family in FAMILIES if family.name == name) for name in ("llama", "gemma3"))
TOKENS, STEPS = random_tokens(2, 160, seed=3), random_tokens(3, 70, seed=4)

CPU_BF16 = functools.partial(torch.autocast, "cpu", dtype=torch.bfloat16)
CPU_F16 = functools.partial(torch.autocast, "cpu", dtype=torch.float16)


@contextlib.contextmanager
def put(get: Callable[[], Any], put_: Callable[[Any], Any], value: Any) -> Iterator[None]:
    """A process-wide setting, inside the context."""
    before = get()
    put_(value)
    try:
        yield
    finally:
        put_(before)


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """Deterministic algorithms, and uninitialized memory full of NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def default_dtype(dtype: torch.dtype) -> AbstractContextManager[None]:
    """Another default dtype."""
    return put(torch.get_default_dtype, torch.set_default_dtype, dtype)


def precision(name: str) -> AbstractContextManager[None]:
    """Less precise products of float32 matrices."""
    return put(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, name)


SETTINGS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "float16": lambda: default_dtype(torch.float16),
    "float64": lambda: default_dtype(torch.float64),
    "default device": lambda: put(lambda: None, torch.set_default_device, "meta"),
    "device context": lambda: torch.device("meta"),
    "deterministic": deterministic,
    "flush denormals": lambda: put(lambda: False, torch.set_flush_denormal, True),
    "inference mode": torch.inference_mode,
}

STORIES = (
    (LLAMA, "spectral", "cpu", False),
    (LLAMA, "spectral", "torch", True),
    (GEMMA3, "sdpa", "auto", False),
)
"""Family, attention, backend, and whether the cache fits itself to its prompt."""


@functools.cache
def model_of(family: Family, attention: str) -> PreTrainedModel:
    """A model, made at torch's own settings."""
    return family.make(attention=attention)


@torch.no_grad()
def story(family: Family, cache: SpectralCache, attention: str, path: Path) -> list[Tensor]:
    """Logits and dense tensors of a cache that is filled, forked, changed, saved and loaded."""
    model = model_of(family, attention)
    found = [model(TOKENS[:, :150], past_key_values=cache).logits]
    fork = cache.fork()
    if len(cache.spectral_layers) == len(cache.layers):
        cache.crop(-3)
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([3, 0, 2], dtype=torch.int64, device="cpu"))
    found += [model(chunk, past_key_values=cache).logits for chunk in (STEPS[:, :1], STEPS[:, 1:68], STEPS[:, 68:69])]
    if cache.calibration is not None:
        cache.save(path)
        cache = SpectralCache.load(path, cache.calibration, config=model.config)
    found.append(model(STEPS[:, 69:], past_key_values=cache).logits)
    found.append(model(TOKENS[:, 150:151], past_key_values=fork).logits)
    return found + [tensor for keys, values, _ in cache for tensor in (keys, values) if tensor is not None]


@functools.cache
def expected_story(family: Family, attention: str, backend: str, path: Path, fitted: bool) -> list[Tensor]:
    """The story at torch's own settings."""
    return story(family, new_cache(family, backend, fitted), attention, path)


def new_cache(family: Family, backend: Any, fitted: bool = False) -> SpectralCache:
    """An empty cache without recent tokens; its constants are made anew."""
    model, options = shared_model(family), {"residual_length": 0, "backend": backend}
    if fitted:
        return SpectralCache.self_calibrating(model, 4.0, **options)
    return SpectralCache(scalar_calibration(model.config, 4.0), model.config, **options)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file to save caches to."""
    return tmp_path_factory.mktemp("ambient") / "cache.safetensors"


@pytest.mark.support("default dtype, default device, deterministic and inference mode")
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("setting", few(SETTINGS, ["bfloat16", "default device", "inference mode"]))
def test_settings_change_nothing(setting: str, path: Path) -> None:
    for family, attention, backend, fitted in STORIES:
        expected = expected_story(family, attention, backend, path, fitted)
        with SETTINGS[setting]():
            found = story(family, new_cache(family, backend, fitted), attention, path)
        assert len(found) == len(expected)
        for ours, theirs in zip(found, expected, strict=True):
            assert ours.dtype == theirs.dtype
            assert torch.equal(ours, theirs)


@pytest.mark.slow
@pytest.mark.support("default dtype, default device, deterministic and inference mode")
@pytest.mark.usefixtures("one_thread")
def test_calibrate_is_the_same_everywhere(tmp_path: Path) -> None:
    def sides() -> list[Tensor]:
        found = calibrate(shared_model(LLAMA), [TOKENS[:1, :96].tolist(), TOKENS[1:, :40]], progress=False)
        found.save_pretrained(tmp_path)
        read = Calibration.from_pretrained(tmp_path)
        return [
            tensor
            for layers in (found.layers, read.layers)
            for layer in layers.values()
            for side in SIDES
            for tensor in (layer.side(side).mean, layer.side(side).analysis, layer.side(side).spectrum)
        ]

    expected = sides()
    assert torch.is_grad_enabled()
    more = {"autocast": CPU_BF16, "no grad": torch.no_grad, "medium": lambda: precision("medium")}
    for name, setting in {**SETTINGS, **more}.items():
        with setting():
            before = (torch.get_default_dtype(), torch.get_default_device(), torch.is_autocast_enabled("cpu"))
            reduced = torch.backends.mkldnn.matmul.fp32_precision
            found = sides()
            assert (torch.get_default_dtype(), torch.get_default_device(), torch.is_autocast_enabled("cpu")) == before
            assert torch.backends.mkldnn.matmul.fp32_precision == reduced
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True)), name


def test_a_common_precision_stays_inherited() -> None:
    """What calibrate() puts back must not hide what the program sets later."""
    setting = functools.partial(setattr, torch.backends, "fp32_precision")
    torch.backends.mkldnn.matmul.fp32_precision = torch.backends.cuda.matmul.fp32_precision = "none"
    with put(lambda: "none", setting, "tf32"):
        with ambient.standard_settings():
            assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"
        assert torch.backends.mkldnn.matmul.fp32_precision == "tf32"
    assert torch.backends.mkldnn.matmul.fp32_precision == "none"


@pytest.mark.support("products in less than float32")
@pytest.mark.parametrize("name", ["high", "medium"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_products_are_float32(name: str, device: str) -> None:
    """No further from the truth than float32 is, at sizes for which torch rounds to TF32 or bfloat16."""
    a, b = (torch.randn(2, 256, 256, dtype=torch.float32).to(device) for _ in range(2))
    exact = a.double() @ b.double()
    allowed = float((a @ b - exact).abs().max())
    with precision(name):
        assert float((ambient.matmul(a, b) - exact).abs().max()) <= allowed


@pytest.mark.support("products in less than float32")
@pytest.mark.gpu
def test_codec_and_attention_without_tf32() -> None:
    config = llama_config(head_dim=128)
    cache = filled(config, torch.float32, torch.float32, "cuda", backend="torch")
    query = torch.randn(1, 4, 1, 128).cuda()
    expected = spectral_attention(query, cache.layers[0].snapshot(), None)
    with precision("medium"):
        other = filled(config, torch.float32, torch.float32, "cuda", backend="torch")
        found = spectral_attention(query, other.layers[0].snapshot(), None)
    for side in SIDES:
        codes, others = (c.layers[0].stores[side].buffers["codes"] for c in (cache, other))
        assert float((codes != others).float().mean()) < 1e-3  # ties may fall either way
    assert float((found - expected).norm() / expected.norm()) < 1e-2


# ---------------------------------------------------------------------- autocast, and keys and values of two dtypes


def filled(
    config: Any, key: torch.dtype, value: torch.dtype, device: str = "cpu", tokens: int = 200, backend: Any = "auto"
) -> SpectralCache:
    """A cache of one layer's random keys and values in two dtypes."""
    heads, dim = config.num_key_value_heads, config.head_dim
    generator = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(1, heads, tokens, dim, generator=generator).to(device) for _ in range(2))
    cache = SpectralCache(scalar_calibration(config, 4.0), config, residual_length=0, backend=backend)
    cache.layers[0].update(keys.to(key), values.to(value))
    cache.layers[0].flush()
    return cache


@pytest.mark.support("torch.autocast")
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("autocast", [CPU_BF16, CPU_F16], ids=["bfloat16", "float16"])
@torch.no_grad()
def test_autocast_is_as_good_as_with_stock_attention(autocast: Callable[[], Any]) -> None:
    config = shared_model(LLAMA).config
    calibration = scalar_calibration(config, 8.0)

    def run(attention: str, cache: DynamicCache) -> Tensor:
        model = LLAMA.make(attention=attention)
        with autocast():
            chunks = (TOKENS[:, :150], *TOKENS[:, 150:].split(1, dim=1))
            return torch.cat([model(chunk, past_key_values=cache).logits.double() for chunk in chunks], dim=1)

    def ours(attention: str, backend: Any) -> float:
        cache = SpectralCache(calibration, config, residual_length=0, backend=backend)
        found = run(attention, cache)
        assert {t.dtype for t in cache.layers[0].tails.values()} == {torch.float32, autocast.keywords["dtype"]}
        return float((found - expected).norm())

    expected = run("sdpa", DynamicCache(config=config))
    allowed = 1.5 * ours("sdpa", "auto")
    assert ours("spectral", "cpu") <= allowed
    assert ours("spectral", "torch") <= allowed
    passing = SpectralCache(calibration, config, residual_length=0, key_bits="dense", value_bits="dense")
    assert torch.equal(run("sdpa", passing), expected)


@pytest.mark.support("torch.autocast")
@pytest.mark.parametrize("autocast", [CPU_BF16, CPU_F16], ids=["bfloat16", "float16"])
def test_factorizations_are_checked_in_full_precision(autocast: Callable[[], Any]) -> None:
    """A right result is no fault of the library, whatever autocast does to the products that check it."""
    config = shared_model(LLAMA).config
    matrices = torch.randn(2, 32, 32)
    functions: list[Any] = [linalg.qr, linalg.inverse, linalg.singular_values, lambda m: linalg.eigh(m + m.mT)]
    expected = [function(matrices) for function in functions], scalar_calibration(config)
    with autocast():
        found = [function(matrices) for function in functions], scalar_calibration(config)
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=0)
    for index, layer in expected[1].layers.items():
        for side in SIDES:
            assert torch.equal(found[1].layers[index].side(side).analysis, layer.side(side).analysis)


@pytest.mark.support("torch.autocast")
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("backend", few(["cpu", "torch"], ["cpu"]))
@torch.no_grad()
def test_operations_on_keys_and_values_of_two_dtypes(backend: Any, tmp_path: Path) -> None:
    for family in (LLAMA, GEMMA3):
        model, calibration = family.make(), scalar_calibration(shared_model(family).config, 4.0)
        cache = SpectralCache(calibration, model.config, residual_length=0, backend=backend)
        with CPU_BF16():
            model(TOKENS[:, :150], past_key_values=cache)
            dtypes = [{side: tail.dtype for side, tail in layer.tails.items()} for layer in cache.spectral_layers]
            cache.save(tmp_path / "cache.safetensors")
            loaded = SpectralCache.load(
                tmp_path / "cache.safetensors", calibration, config=model.config, backend=backend
            )
            copies = (copy.deepcopy(cache), loaded, cache.fork(), cache)
            logits = [model(TOKENS[:, 150:151], past_key_values=each).logits for each in copies]
            assert all(torch.equal(each, logits[0]) for each in logits)
            assert all(held(each) == dtypes for each in copies)
            cache.batch_repeat_interleave(2)
            cache.reorder_cache(torch.tensor([2, 0]))
            if family is LLAMA:
                cache.crop(-60)
            model(TOKENS[:, 151:], past_key_values=cache)
            assert held(cache) == dtypes
            for layer, each in zip(cache.layers, cache, strict=True):
                if layer in cache.spectral_layers:
                    assert [tensor.dtype for tensor in each[:2] if tensor is not None] == list(held(cache)[0].values())
            fresh = SpectralCache(calibration, model.config, residual_length=0, backend=backend)
            beams = model.generate(TOKENS[:, :120], num_beams=2, max_new_tokens=20, past_key_values=fresh)
        assert beams.shape == (2, 140)
        assert fresh.memory().total > 0


def held(cache: SpectralCache) -> list[dict[str, torch.dtype]]:
    """Dtypes of the tails and sinks, which agree, of every spectral layer."""
    for layer in cache.spectral_layers:
        assert {side: sinks.dtype for side, sinks in layer.sinks.items()} == {
            s: t.dtype for s, t in layer.tails.items()
        }
    return [{side: tail.dtype for side, tail in layer.tails.items()} for layer in cache.spectral_layers]


MIXTURES = [
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
    (torch.bfloat16, torch.float16),
    (torch.float16, torch.float32),
]


@pytest.mark.slow
@pytest.mark.support("keys and values of different dtypes")
@pytest.mark.parametrize(
    ("key", "value", "backend"),
    [(*mixture, backend) for mixture in MIXTURES for backend in ("cpu", "torch")]
    + [pytest.param(*MIXTURES[0], "triton", marks=pytest.mark.triton)],
    ids=str,
)
@torch.no_grad()
def test_kernels_read_two_dtypes(key: torch.dtype, value: torch.dtype, backend: Any) -> None:
    """The new tokens and the sinks are read as they are: no worse than plain torch in float32."""
    cache = filled(llama_config(), key, value, tokens=100, backend=backend)
    view = cache.layers[0].snapshot()
    query = torch.randn(1, 4, 1, 64, dtype=torch.float32)
    exact, plain = (truth.attention(query, view, None, dtype=dtype) for dtype in (torch.float64, torch.float32))
    for name in ("keys", "values"):
        dense = getattr(cache.layers[0], name)
        assert dense.dtype == (key if name == "keys" else value)
    found = spectral_attention(query, view, None)
    assert found.dtype == query.dtype
    assert float((found - exact).abs().max()) <= 2 * float((plain - exact).abs().max())
    assert spectral_attention(query.bfloat16(), view, None).dtype == torch.bfloat16


@pytest.mark.support("keys and values of different dtypes")
@torch.no_grad()
def test_short_prompts_of_two_dtypes() -> None:
    """Before anything is packed, where torch's fused attention would refuse them."""
    config = llama_config()
    cache = SpectralCache(scalar_calibration(config, 4.0), config)
    states = [torch.randn(1, 2, 8, 64, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)]
    lazy = cache.update(*states, 0)
    query = torch.randn(1, 4, 8, 64, dtype=torch.float32)
    found, _ = spectral_attention_forward(torch.nn.Module(), query, *lazy, None)
    keys, values = (x.float().repeat_interleave(2, 1) for x in states)
    expected = torch.nn.functional.scaled_dot_product_attention(query, keys, values, is_causal=True)
    torch.testing.assert_close(found, expected.transpose(1, 2))


# ---------------------------------------------------------------------- inference mode, threads


@pytest.mark.support("torch.inference_mode")
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("options", [{}, {"key_bits": "dense"}, {"key_bits": "dense", "value_bits": "dense"}], ids=str)
@pytest.mark.parametrize("attention", ["spectral", "sdpa"])
def test_gradients_through_what_inference_mode_has_made(attention: str, options: dict[str, Any]) -> None:
    """A cache filled in inference mode is read under autograd afterwards, with the gradients it would have had."""
    model = LLAMA.make(attention=attention).requires_grad_(False)
    weight = model.model.layers[1].self_attn.q_proj.weight.requires_grad_()  # keys and values stay constants
    calibration = scalar_calibration(model.config, 4.0)
    gradients = []
    for mode in (torch.inference_mode, torch.no_grad):
        cache = SpectralCache(calibration, model.config, residual_length=0, backend="torch", **options)
        with mode():
            model(TOKENS[:, :140], past_key_values=cache)
            cache.batch_repeat_interleave(2)
            cache.reorder_cache(torch.tensor([0, 3]))
        model(TOKENS[:, 140:], past_key_values=cache).logits.square().sum().backward()
        gradients.append(weight.grad)
        weight.grad = None
        with mode():
            model(TOKENS[:, :80], past_key_values=cache)
    assert float(gradients[1].norm()) > 0
    assert torch.equal(*gradients)


@pytest.mark.support("another number of threads")
@pytest.mark.parametrize("heads", [2, 8])
@torch.no_grad()
def test_another_number_of_threads(heads: int) -> None:
    """At whatever number ``test_threads.py`` runs it with: a head dimension for which batched inverses fail."""
    config = llama_config(head_dim=160, kv_heads=heads, layers=1)
    view = filled(config, torch.float32, torch.float32, backend="cpu").layers[0].snapshot()
    query = torch.randn(1, 2 * heads, 1, 160, dtype=torch.float32)
    exact, plain = (truth.attention(query, view, None, dtype=dtype) for dtype in (torch.float64, torch.float32))
    found = spectral_attention(query, view, None)
    assert float((found - exact).abs().max()) <= 2 * float((plain - exact).abs().max())
    keys = torch.randn(1, heads, 200, 160, generator=torch.Generator().manual_seed(0))
    dense = view.dense("key")
    assert float(dense.norm()) < 2 * float(keys.norm())  # with a wrong inverse it was a billion times


# ---------------------------------------------------------------------- the source

FACTORIES = {
    "arange", "as_tensor", "empty", "empty_strided", "eye", "full", "linspace", "logspace", "ones", "rand",
    "randint", "randn", "randperm", "scalar_tensor", "tensor", "tril_indices", "triu_indices", "zeros", "hann_window",
    "complex", "normal", "range", "sparse_coo_tensor",
}  # fmt: skip
"""Functions of torch that take dtype or device from the ambient defaults."""

TAKES_DTYPE_FROM_ITS_ARGUMENT = {"as_tensor"}


@pytest.mark.support("default dtype, default device, deterministic and inference mode")
@pytest.mark.parametrize("folder", ["quantcache", "kernels"])
def test_every_tensor_states_dtype_and_device(folder: str) -> None:
    missing, seen = [], 0
    for source in sorted((ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            name = node.func.attr
            if ast.unparse(node.func) == f"torch.{name}" and name in FACTORIES:
                seen += 1
                stated = {keyword.arg for keyword in node.keywords}
                wanted = {"device"} if name in TAKES_DTYPE_FROM_ITS_ARGUMENT else {"dtype", "device"}
                if not wanted <= stated:
                    missing.append(f"{source.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)}")
    assert seen > 10
    assert not missing, "\n".join(missing)


@pytest.mark.parametrize("folder", ["quantcache", "kernels", "benchmarks"])
def test_nothing_factorizes_past_the_checks(folder: str) -> None:
    """Batched LAPACK calls of torch's are wrong at some numbers of threads; those of ``coding.linalg`` are not."""
    unsafe = {
        "cholesky",
        "cond",
        "eig",
        "eigh",
        "eigvalsh",
        "inv",
        "lstsq",
        "lu",
        "matrix_rank",
        "pinv",
        "qr",
        "slogdet",
    }
    unsafe |= {"solve", "solve_triangular", "svd", "svdvals", "inverse", "pinverse", "det", "cholesky_solve", "logdet"}
    found = []
    for source in sorted((ROOT / folder).rglob("*.py")):
        if source == ROOT / "quantcache" / "coding" / "linalg.py":
            continue
        for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and node.attr in unsafe:
                owner = ast.unparse(node.value)
                if owner in ("torch", "torch.linalg"):
                    found.append(f"{source.relative_to(ROOT)}:{node.lineno}: {owner}.{node.attr}")
    assert not found, "\n".join(found)
