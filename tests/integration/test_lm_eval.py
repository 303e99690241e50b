"""lm-eval's model type ``quantcache``: as lm-eval's own ``hf``, but through a cache that is really read."""

from __future__ import annotations

import json
import sys
import tomllib
from collections.abc import Sequence
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    T5Config,
)

from quantcache import Calibration, CalibrationMismatch, SpectralCache, UnsupportedModel, data
from quantcache.common.errors import QuantCacheError
from tests.builders import scalar_calibration
from tests.helpers import Run, divergence, error, feed

pytest.importorskip("lm_eval", reason="needs lm-eval: make test-lm-eval")

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from quantcache.evaluation.lm_eval import QuantCacheLM

pytestmark = pytest.mark.usefixtures("one_thread")

TEXT = data.evaluation_text()
ROOT = Path(__file__).resolve().parent.parent.parent


def ours(bits: float | None = None, **options: Any) -> QuantCacheLM:
    """The bundled model with its calibration, in float32 on the CPU."""
    calibration = None if "method" in options else "wiki11m"
    return QuantCacheLM("wiki11m", calibration, bits=bits, **{"device": "cpu", "dtype": "float32", **options})


def theirs(dtype: str) -> HFLM:
    """The same model as lm-eval's own."""
    return HFLM(str(data.demo_model_path()), device="cpu", dtype=dtype)


def instances(kind: str, arguments: Sequence[tuple]) -> list[Instance]:
    """Requests as lm-eval makes them of a task."""
    return [Instance(kind, {}, each, index) for index, each in enumerate(arguments)]  # type: ignore[arg-type]


def scores(lm: HFLM, *pairs: tuple[str, str]) -> list[float]:
    """Log-likelihoods of (context, continuation)."""
    return [score for score, _ in lm.loglikelihood(instances("loglikelihood", pairs), disable_tqdm=True)]


def answers(lm: HFLM, prompts: Sequence[str], **options: Any) -> list[str]:
    """Continuations of prompts."""
    return lm.generate_until(instances("generate_until", [(prompt, options) for prompt in prompts]), disable_tqdm=True)


def read_by_hand(lm: QuantCacheLM, tokens: Sequence[int], count: int, **options: Any) -> float:
    """Log-likelihood of the last tokens after all others, through a cache, without lm-eval."""
    steps, left = [68], len(tokens) - 1 - 68
    while left > 0:
        steps.append(min(64, left))
        left -= 64
    cache = SpectralCache(Calibration.for_model("wiki11m"), lm.model.config, **options)
    logits = feed(lm.model, cache, torch.tensor([tokens[:-1]]), steps)[0].float()[-count:]
    return float(logits.log_softmax(-1).gather(1, torch.tensor(tokens[-count:])[:, None]).sum())


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    """Two rows of 270 tokens."""
    return torch.tensor(theirs("float32").tok_encode(TEXT[:4000])[:540]).view(2, 270)


def test_lm_eval_finds_the_model_type() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    [(name, value)] = project["entry-points"]["lm_eval.models"].items()
    assert EntryPoint(name, value, "lm_eval.models").load() is get_model("quantcache") is QuantCacheLM
    assert name == "quantcache"


def test_a_dense_cache_reads_as_lm_eval_does(tokens: Tensor) -> None:
    truth = theirs("float64")._model_call(tokens)
    allowed = 2 * error(theirs("float32")._model_call(tokens).double(), truth)
    assert error(ours(method="dense")._model_call(tokens).double(), truth) <= allowed
    assert error(ours(8, residual_length=270)._model_call(tokens).double(), truth) <= allowed


@pytest.mark.parametrize("options", [{"method": "dense"}, {"bits": 0}, {"bits": 0, "sink_length": 0, "chunk": 68}])
def test_what_fits_into_one_pass_reads_no_cache(options: dict[str, Any], tokens: Tensor) -> None:
    lm = ours(**options)
    assert torch.equal(lm._model_call(tokens[:, :68]), theirs("float32")._model_call(tokens[:, :68]))


def test_scores_follow_the_bits(tokens: Tensor) -> None:
    dense = theirs("float32")._model_call(tokens).double()
    losses = [divergence(dense, ours(bits, residual_length=0)._model_call(tokens).double()) for bits in (4, 2, 0)]
    assert 0 < losses[0] < losses[1] < losses[2]
    rolling = instances("loglikelihood_rolling", [(TEXT[:1500],)])
    found = [
        (scores(lm, (TEXT[:700], TEXT[700:740]))[0], lm.loglikelihood_rolling(rolling, disable_tqdm=True)[0])
        for lm in (ours(method="dense"), ours(0, residual_length=0))
    ]
    assert found[0][0] != found[1][0]
    assert found[0][1] > found[1][1]  # the text as a whole is less likely to who has forgotten its beginning


@pytest.mark.parametrize("options", [{"bits": 3}, {"bits": 2, "residual_length": 0}, {"key_bits": 4, "value_bits": 2}])
def test_scores_are_those_of_the_cache(options: dict[str, Any]) -> None:
    lm = ours(**options)
    context, continuation = TEXT[:700], TEXT[700:800]
    whole, behind = lm._encode_pair(context, continuation)
    assert scores(lm, (context, continuation)) == [read_by_hand(lm, whole + behind, len(behind), **options)]
    once = lm.tok_encode(TEXT[:800])
    found = lm.loglikelihood_rolling(instances("loglikelihood_rolling", [(TEXT[:800],)]), disable_tqdm=True)
    assert found == [read_by_hand(lm, [lm.prefix_token_id, *once], len(once), **options)]


def test_text_beyond_the_limit_is_cut_as_lm_eval_does() -> None:
    lm = ours(3, max_length=200)
    context, continuation = TEXT[:2400], TEXT[2400:2500]
    whole, behind = lm._encode_pair(context, continuation)
    assert len(whole) > 400
    assert scores(lm, (context, continuation)) == [read_by_hand(lm, (whole + behind)[-201:], len(behind), bits=3)]
    assert answers(lm, [context], max_gen_toks=20) == answers(lm, [lm.tok_decode(whole[-180:])], max_gen_toks=20)


def test_rows_of_a_batch_do_not_see_each_other() -> None:
    lm = ours(2, residual_length=0, batch_size=2)
    long, short = (TEXT[:700], TEXT[700:730]), (TEXT[4000:4400], TEXT[4400:4430])
    others = (TEXT[9000:9700], TEXT[9700:9730]), (TEXT[20000:20300], TEXT[20300:20330])
    together = scores(lm, long, short)
    assert scores(lm, long, others[1])[0] == together[0]
    longer = torch.tensor(lm.tok_encode(others[0][0])), torch.tensor(lm.tok_encode(long[0]))
    row = torch.tensor(lm.tok_encode(short[0]))
    length = min(len(longer[0]), len(longer[1]))
    padded = torch.nn.functional.pad(row, (0, length - len(row)))
    first, second = (lm._model_call(torch.stack([each[:length], padded]))[1, : len(row)] for each in longer)
    assert torch.equal(first, second)


@pytest.mark.parametrize("options", [{"do_sample": False}, {"do_sample": True, "temperature": 0.8}, {"num_beams": 2}])
def test_generation_reads_the_cache(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    lm = ours(2, residual_length=0, batch_size=3)
    prompts = [TEXT[:900], TEXT[5000:5500], TEXT[9000:9800]]
    caches: list[SpectralCache] = []
    make = lm.make_cache
    monkeypatch.setattr(lm, "make_cache", lambda: caches.append(make()) or caches[-1])
    torch.manual_seed(1)
    found = answers(lm, prompts, max_gen_toks=12, **options)
    [cache] = caches
    assert cache.memory().encoded_elements > 0
    by_length = sorted(range(3), key=lambda row: -len(lm.tok_encode(prompts[row])))
    inputs = lm.tokenizer([prompts[row] for row in by_length], padding=True, padding_side="left", return_tensors="pt")
    assert not inputs.attention_mask.all()
    torch.manual_seed(1)
    same = SpectralCache(Calibration.for_model("wiki11m"), lm.model.config, bits=2, residual_length=0)
    output = lm.model.generate(**inputs, past_key_values=same, max_new_tokens=12, **options)
    for row, tokens in zip(by_length, output[:, inputs.input_ids.shape[1] :], strict=True):
        assert found[row] == lm.tok_decode(tokens)


def test_generation_ends_where_it_is_told() -> None:
    lm = ours(3)
    [whole] = answers(lm, [TEXT[:900]], max_gen_toks=16)
    assert len(lm.tok_encode(whole)) == 16
    word = whole.split()[2]
    assert answers(lm, [TEXT[:900]], max_gen_toks=16, until=[word]) == [whole[: whole.index(word)]]


def test_counts_tell_whether_codes_were_read(caplog: pytest.LogCaptureFixture) -> None:
    lm = ours(3, batch_size=2)
    scores(lm, ("The city of", " Leiden"), ("A", " word"))
    about = lm.get_model_info()["quantcache"]
    assert (about["cache"], about["bits_per_element"], about["tokens_from_codes"]) == ("spectral-3", 3.125, 0)
    assert about["tokens"] > 0
    assert "too short" in caplog.text
    caplog.clear()
    lm = ours(3)
    context = lm.tok_decode(lm.tok_encode(TEXT)[:260])
    whole, behind = lm._encode_pair(context, TEXT[1500:1700])
    scores(lm, (context, TEXT[1500:1700]))
    # 132 tokens must be there before the first block is packed, which is when the piece from 132 on is read
    assert lm.get_model_info()["quantcache"]["tokens_from_codes"] == len(behind) == lm.tokens
    lm = ours(3)
    lm._model_generate(torch.tensor([whole[:130]]), 140, [])
    assert (lm.tokens, lm.tokens_from_codes) == (10, 7)  # steps that find 132 tokens and more: those of 133 to 139
    assert "too short" not in caplog.text
    assert ours(method="dense").get_model_info()["quantcache"]["tokens_from_codes"] is None


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({}, QuantCacheError, r"no calibration: add calibration=FOLDER .* smollm2-135m.* come along"),
        ({"calibration": "wiki11m", "method": "dense", "bits": 3}, QuantCacheError, "method=dense and bits=3"),
        ({"calibration": "wiki11m", "chunk": 0}, QuantCacheError, "chunk must be a whole number of at least 1, got 0"),
        ({"calibration": "wiki11m", "bits": 9}, QuantCacheError, "bits must lie between .* 8, got 9"),
        ({"calibration": "wiki11m", "bits": "three"}, QuantCacheError, "'three'"),
        ({"calibration": "wiki11m", "residual_length": -1}, QuantCacheError, "residual_length .* at least 0, got -1"),
        ({"calibration": "wiki11m", "sink_length": "4k"}, QuantCacheError, "sink_length .* at least 0, got '4k'"),
        ({"calibration": "wiki11m", "cache_backend": "gpu"}, QuantCacheError, "'gpu'"),
        ({"calibration": "smollm2-135m"}, CalibrationMismatch, "layers"),
        ({"method": "best"}, QuantCacheError, "unknown method 'best'"),
        ({"method": "spectral-3"}, QuantCacheError, "spectral-3 needs a calibration"),
        ({"method": "oscar-3"}, QuantCacheError, "oscar-3 is fitted to a text first"),
    ],
)
def test_bad_arguments_are_refused(options: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        QuantCacheLM("wiki11m", device="cpu", **options)


def test_encoder_decoders_are_refused(tmp_path: Path) -> None:
    T5Config().save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match="encoder-decoder"):
        QuantCacheLM(str(tmp_path), method="dense", device="cpu")


@pytest.mark.parametrize("kind", ["falcon", "gptj"])
def test_models_that_compute_attention_by_themselves(kind: str, tmp_path: Path) -> None:
    """They know no name of an attention but their own: loading them ended in KeyError 'spectral'."""
    tokenizer = AutoTokenizer.from_pretrained(data.demo_model_path())
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "bos_token_id": 0, "eos_token_id": 0}
    config = AutoConfig.for_model(
        kind, vocab_size=len(tokenizer), **sizes, **({"rotary_dim": 8} if kind == "gptj" else {})
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    options = {"device": "cpu", "dtype": "float32"}
    ours, exact = (
        QuantCacheLM(str(tmp_path), scalar_calibration(config, bits), residual_length=0, **options)
        for bits in (2.0, 8.0)
    )
    dense = QuantCacheLM(str(tmp_path), method="dense", **options)
    text = (TEXT[:900], TEXT[900:950])
    found = [abs(scores(lm, text)[0] - scores(dense, text)[0]) for lm in (ours, exact)]
    assert found[1] < found[0]


def test_a_loaded_model_keeps_its_attention(
    demo_model: PreTrainedModel, demo_tokenizer: PreTrainedTokenizerBase
) -> None:
    before = demo_model.config._attn_implementation
    options = {"bits": 2, "residual_length": 0}
    lm = QuantCacheLM(demo_model, Calibration.for_model("wiki11m"), tokenizer=demo_tokenizer, **options)
    assert demo_model.config._attn_implementation == before
    context, continuation = TEXT[:900], TEXT[900:950]
    whole, behind = lm._encode_pair(context, continuation)
    assert scores(lm, (context, continuation)) == [read_by_hand(lm, whole + behind, len(behind), **options)]


TASKS = {
    "choose": "output_type: multiple_choice\ndoc_to_choice: '{{choices}}'\ndoc_to_target: '{{answer}}'\n"
    "metric_list: [{metric: acc}]",
    "write": "output_type: generate_until\ndoc_to_target: x\nmetric_list: [{metric: exact_match}]\n"
    "generation_kwargs: {until: ['.'], max_gen_toks: 8}",
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two tasks and their data."""
    folder = tmp_path_factory.mktemp("tasks")
    documents = [
        {"text": TEXT[at : at + 900], "choices": [TEXT[at + 900 : at + 930], TEXT[at + 2000 : at + 2030]], "answer": 0}
        for at in (0, 4000)
    ]
    (folder / "documents.jsonl").write_text("\n".join(map(json.dumps, documents)), "utf-8")
    files = json.dumps({"data_files": str(folder / "documents.jsonl"), "cache_dir": str(folder / "cache")})
    for name, what in TASKS.items():
        lines = (
            f"task: {name}\ndataset_path: json\ndataset_kwargs: {files}\ntest_split: train\ndoc_to_text: '{{{{text}}}}'"
        )
        (folder / f"{name}.yaml").write_text(f"{lines}\n{what}\n", "utf-8")
    return folder


def test_a_task_with_a_chat_template(tasks: Path) -> None:
    lm = ours(0, residual_length=0)
    lm.tokenizer.chat_template = "{% for m in messages %}[USER]{{ m.content }}[/USER]{% endfor %}[REPLY]"
    found = simple_evaluate(
        lm,
        tasks=list(TASKS),
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        apply_chat_template=True,
        bootstrap_iters=0,
    )
    [sample, *_] = found["samples"]["choose"]
    prompt, continuation = sample["arguments"][0]
    assert prompt.startswith("[USER]")
    assert prompt.endswith("[REPLY]")
    assert [sample["resps"][0][0][0]] == scores(lm, (prompt, continuation))
    assert found["config"]["quantcache"]["tokens_from_codes"] > 0


def test_command_line(run: Run, tasks: Path, tmp_path: Path) -> None:
    arguments = ["lm-eval", "--model", "quantcache", "--tasks", "choose", "--include_path", tasks, "--device", "cpu"]
    named = "pretrained=wiki11m,calibration=wiki11m,dtype=float32,residual_length=0,bits=2.5"
    status, out, _ = run(*arguments, "--model_args", named, "--batch_size", 2, "--output_path", tmp_path / "found")
    assert status == 0
    assert "|choose" in out
    [path] = (tmp_path / "found").rglob("results_*.json")
    about = json.loads(path.read_text("utf-8"))["config"]["quantcache"]
    assert about["cache"] == "spectral-2.5"
    assert about["tokens_from_codes"] > 0


@pytest.mark.parametrize(
    ("raised", "shown"),
    [
        (QuantCacheError("there is no calibration"), "error: there is no calibration"),
        (OSError("Repo id must be short"), "error: Repo id must be short"),
        (FileNotFoundError(2, "No such file", "x.gguf"), "error: x.gguf: No such file"),
        (OSError(28, "No space left on device"), "error: stdout: No space left on device"),
    ],
)
def test_an_error_ends_in_one_line(run: Run, monkeypatch: pytest.MonkeyPatch, raised: Exception, shown: str) -> None:
    def fail() -> None:
        assert sys.argv == ["lm-eval", "run", "--help", "--json"]  # everything is lm-eval's
        raise raised

    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", fail)
    before = sys.argv
    status, out, err = run("lm-eval", "run", "--help", "--json")
    assert (status, out, err) == (1, "", shown + "\n")
    assert sys.argv is before
