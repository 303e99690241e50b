"""The command line where things go wrong around it: Ctrl-C, streams that are full or closed, terminals of few words."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import LocalTokenNotFoundError
from rich.console import Console
from rich.table import Table
from transformers import LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from quantcache import data
from quantcache.artifact import hub
from quantcache.artifact.calibration import Calibration
from quantcache.artifact.card import render_card
from quantcache.artifact.files import CONFIG_NAME
from quantcache.cli import main
from quantcache.cli.loading import read_text
from quantcache.cli.terminal import Shown, print_result
from quantcache.common.errors import HubError
from quantcache.common.jsonfile import to_json
from quantcache.common.plaintext import markdown, one_line, printable
from tests.builders import llama_config
from tests.helpers import Run

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.support("command line: streams, Ctrl-C, hostile text")]

ROOT = Path(__file__).resolve().parent.parent.parent
HOSTILE = "evil\x1b[31m\x9b2J\u202e[red]x[/red] | `$(x)`\n\n# title\n---\nlicense: mit\n"


def command(shell: str, **more: str) -> subprocess.CompletedProcess[bytes]:
    """Run ``quantcache`` with redirections."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **more}
    shell = shell.replace("quantcache ", f"{sys.executable} -m quantcache ")
    return subprocess.run(["bash", "-c", shell], env=environment, capture_output=True, check=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts, a model with a chat template, one that gives NaN, and a calibration with hostile notes."""
    folder = tmp_path_factory.mktemp("terminal")
    (folder / "text.txt").write_text(data.calibration_text()[:4000], "utf-8")
    (folder / "held_out.txt").write_text(data.evaluation_text()[:6000], "utf-8")
    (folder / "latin.txt").write_bytes(b"The caf\xe9 " * 100)
    (folder / "utf16.txt").write_bytes("The city".encode("utf-16"))
    hostile = Calibration.synthetic(llama_config(64, layers=1), 3.0)
    recipe = {**hostile.metadata.recipe, "note": HOSTILE, HOSTILE: 1}
    base_model = {**hostile.metadata.base_model, "id": HOSTILE, "revision": HOSTILE}
    metadata = replace(hostile.metadata, recipe=recipe, base_model=base_model)
    Calibration(hostile.layers, metadata).save_pretrained(folder / "hostile")
    return folder


def is_plain(text: str) -> bool:
    """Whether a terminal would show all of a text, and obey nothing."""
    return all(char.isprintable() or char == "\n" for char in text)


# ------------------------------------------------------------------ streams


@pytest.mark.parametrize(
    ("shell", "status", "expected"),
    [
        ("quantcache --help | head -1 >/dev/null; exit ${PIPESTATUS[0]}", 1, b""),
        ("quantcache --help >/dev/full", 1, b"error: stdout: No space left on device\n"),
        ("quantcache --help >&-", 1, b"error: stdout: it is closed\n"),
        ("quantcache frobnicate 2>/dev/full", 2, b""),
        ("quantcache frobnicate 2>&-", 2, b""),
        ("quantcache inspect --bits 9 x >&- <&-", 2, b"error: "),
    ],
    ids=["head", "full", "closed", "stderr full", "stderr closed", "two closed"],
)
def test_streams(shell: str, status: int, expected: bytes) -> None:
    if "head" in shell:  # the reader has gone before anything is written
        shell = shell.replace("head -1 >/dev/null", "true")
    result = command(shell)
    assert result.returncode == status, result
    assert result.stderr.startswith(expected)
    assert result.stderr.count(b"\n") <= 1
    assert b"Traceback" not in result.stdout


def test_a_result_that_does_not_arrive(run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for options in ((), ("--json",)):
        with open("/dev/full", "w", encoding="utf-8") as full, monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", full)
            assert run("inspect", folder / "hostile", *options) == (1, "", "error: stdout: No space left on device\n")


@pytest.mark.parametrize("options", [(), ("--json",)], ids=["table", "json"])
def test_ascii_terminals(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...]
) -> None:
    with open(tmp_path / "out", "w", encoding="ascii") as out, open(tmp_path / "err", "w", encoding="ascii") as err:
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setattr(sys, "stderr", err)
        monkeypatch.setenv("TERM", "dumb")
        for name, status in (("hostile", 0), ("caf\u00e9-\u65e5/\udcff", 1)):
            with pytest.raises(SystemExit) as caught:
                main(["inspect", str(folder / name), *options])
            assert caught.value.code == status
    assert is_plain((tmp_path / "out").read_text("ascii"))
    message = (tmp_path / "err").read_text("ascii")
    assert is_plain(message)
    assert message.startswith("error: ")
    assert message.count("\n") == 1


def test_the_c_locale() -> None:
    for more in ({"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}):
        result = command("quantcache frobnicat\u00e9", TERM="dumb", **more)
        assert (result.returncode, result.stderr.count(b"\n")) == (2, 1)
        assert is_plain(result.stderr.decode("ascii"))


def test_json_on_ascii_streams(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    content = {"a": "caf\u00e9 \U0001f600 \x1b \x9b \u202e \ud800"}
    for encoding in ("ascii", "latin-1", "utf-8"):
        with open(tmp_path / "out", "w", encoding=encoding, errors="backslashreplace") as stream:
            monkeypatch.setattr(sys, "stdout", stream)
            print_result(to_json(content))
        assert json.loads((tmp_path / "out").read_text(encoding)) == content
        assert is_plain((tmp_path / "out").read_text(encoding))


# ------------------------------------------------------------------- Ctrl-C


MOMENTS = {
    "while the command line is imported": "at_import('typer')",
    "while a verb imports its parts": "at_import('transformers.models')",
    "while the model is loaded": "at_import('quantcache.calibration.calibrator')",
    "while Python shuts down": "atexit.register(interrupt)",
}
_INTERRUPT = """
import atexit, os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)

def interrupt():
    os.kill(os.getpid(), signal.SIGINT)

def at_import(wanted):
    class Finder:
        def find_spec(self, name, *rest):
            if name.startswith(wanted):
                sys.meta_path.remove(finder)
                interrupt()
    finder = Finder()
    sys.meta_path.insert(0, finder)
"""


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS.values(), ids=MOMENTS)
def test_interrupted(folder: Path, tmp_path: Path, moment: str) -> None:
    arguments = ["calibrate", "wiki11m", "--text", str(folder / "text.txt"), "-o", str(tmp_path / "out")]
    if "atexit" in moment:
        arguments = ["--help"]
    code = f"{_INTERRUPT}\n{moment}\nsys.argv[1:] = {arguments!r}\nfrom quantcache.__main__ import main\nmain()"
    (tmp_path / "code.py").write_text(code, "utf-8")
    result = command(f"exec {sys.executable} {tmp_path}/code.py")
    assert (result.stderr, result.returncode) == (b"error: interrupted\n", 130)
    assert not (tmp_path / "out").exists()


def test_interrupted_in_a_verb(run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["quantcache.cli.loading"], "read_utf8", stop)
    for arguments in (
        ("eval", "wiki11m", "--text", folder / "held_out.txt", "--methods", "dense"),
        ("calibrate", "wiki11m", "--text", folder / "text.txt", "-o", folder / "never"),
    ):
        assert run(*arguments) == (130, "", "error: interrupted\n")
    assert not (folder / "never").exists()


# -------------------------------------------------------------- hostile text


def test_an_artifact_does_not_speak_to_the_terminal(run: Run, folder: Path) -> None:
    status, out, err = run("inspect", folder / "hostile")
    assert status == 0
    assert is_plain(out + err)
    assert "[red]x[/red]" in out  # no markup
    status, out, _ = run("inspect", folder / "hostile", "--json")
    assert is_plain(out)
    assert json.loads(out)["base_model"]["id"] == HOSTILE
    (folder / "wrong").mkdir(exist_ok=True)
    config = json.loads((folder / "hostile" / CONFIG_NAME).read_text("utf-8"))
    (folder / "wrong" / CONFIG_NAME).write_text(json.dumps(config | {"format": HOSTILE}), "utf-8")
    (folder / "wrong" / "calibration.safetensors").write_bytes(b"")
    status, out, err = run("inspect", folder / "wrong")
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert is_plain(err)


def test_a_card_keeps_its_structure() -> None:
    calibration = Calibration.synthetic(llama_config(64, layers=1), 3.0)
    config = {"base_model": {"id": HOSTILE}, "recipe": {"note": HOSTILE, HOSTILE: "<script>x</script>"}}
    card = render_card(config, 3.0, 3.125, [{"method": HOSTILE, "a|b": 1}], repo_id='x")\n```\n# y')
    plain = render_card(
        {"base_model": {"id": None}, "recipe": {"note": "x", "y": "z"}}, 3.0, 3.125, [{"method": "x", "a": 1}]
    )
    kept = [line for line in card.splitlines() if not line.startswith("|")]
    assert kept == [line for line in plain.splitlines() if not line.startswith("|")]
    assert len(card.splitlines()) == len(plain.splitlines())
    assert is_plain(card)
    assert "<script>" not in card.replace("\\<script\\>", "")
    assert str(calibration.generate_model_card())


def test_what_is_written_out() -> None:
    assert printable("caf\u00e9 \u65e5 \U0001f600 [red]") == "caf\u00e9 \u65e5 \U0001f600 [red]"
    assert printable("\x1b[31m\x9b\x7f\u202e\u2028\ud800\n") == r"\x1b[31m\x9b\x7f\u202e\u2028\ud800\n"
    assert printable("a\nb\tc\r", keep="\n\t") == "a\nb\tc\\r"
    assert one_line(" a\n b\r\x1b") == r"a b \x1b"
    assert markdown("a|b\n`c` <d> [e](f)") == r"a\|b \`c\` \<d\> \[e\](f)"
    console = Console(width=40, force_terminal=True, color_system="standard", markup=False)
    table = Table("x", title="[bold]t")
    table.add_row("\x1b]0;title\x07")
    with console.capture() as captured:
        console.print(Shown(table))
    assert "\x1b]" not in captured.get()
    assert r"\x1b]0;title" in captured.get()


# -------------------------------------------------------- texts and devices


def test_text_that_is_not_utf8(run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    status, _, err = run("calibrate", "wiki11m", "-o", folder / "never", "--text", folder / "latin.txt")
    assert (status, err) == (
        1,
        f"error: {folder}/latin.txt is not UTF-8 text: invalid continuation byte 0xe9 at byte 7\n",
    )
    status, _, err = run("calibrate", "wiki11m", "-o", folder / "never", "--text", folder / "utf16.txt")
    assert "utf16.txt is not UTF-8 text: it is UTF-16: save it as UTF-8" in err
    arguments = ("generate", "wiki11m", "-c", folder / "hostile", "--prompt")
    status, _, err = run(*arguments, "caf\udce9 s")
    assert (status, err) == (1, "error: --prompt is not UTF-8 text: invalid continuation byte 0xe9 at byte 3\n")
    with open(folder / "latin.txt", encoding="utf-8") as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        status, _, err = run(*arguments, "-")
    assert (status, err) == (1, "error: stdin is not UTF-8 text: invalid continuation byte 0xe9 at byte 7\n")


def test_the_mark_before_a_text_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("The city", "utf-8-sig")
    assert read_text(tmp_path / "text.txt") == "The city"


@pytest.mark.parametrize(
    "device", ["", "meta", "abacus", "cuda:99", "cuda:-1", "cpu,cuda", "CPU", "cpu:x", "\x1b[31m", "disk"]
)
def test_devices(run: Run, folder: Path, device: str) -> None:
    status, out, err = run(
        "calibrate", "wiki11m", "-o", folder / "never", "--text", folder / "text.txt", "--device", device
    )
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert "cannot be used" in err
    assert is_plain(err)
    assert not (folder / "never").exists()


# ------------------------------------------------------------------- outputs


def test_places_to_write_to(run: Run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_model(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the model was loaded first")

    for name in ("calibrate", "analyze", "eval"):
        monkeypatch.setattr(sys.modules[f"quantcache.cli.{name}"], "load_model", no_model)
    (tmp_path / "file").write_text("x")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.tex").write_text("x")
    calibrate = ("calibrate", "wiki11m", "--text", folder / "text.txt", "-o")
    evaluate = ("eval", "wiki11m", "--text", folder / "held_out.txt", "--methods", "dense", "-o")
    for arguments, expected in (
        ((*calibrate, tmp_path / "file"), "file is a file"),
        ((*calibrate, tmp_path / "file" / "below"), "Not a directory"),
        ((*calibrate, "/proc/none/such"), "No such file"),
        ((*calibrate, tmp_path / "foreign"), "foreign holds thesis.tex and none of calibration_config.json"),
        (("analyze", "wiki11m", "-o", tmp_path / "file"), "file is a file"),
        ((*evaluate, tmp_path / "foreign"), "foreign is a folder"),
        ((*evaluate, "/proc/result.json"), "/proc"),
        ((*evaluate, tmp_path / "no" / "result.json"), "there is no folder"),
    ):
        status, out, err = run(*arguments)
        assert (status, out, err.count("\n")) == (1, "", 1), err
        assert expected in err
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "foreign", "thesis.tex"]


def test_a_folder_that_was_made_goes_with_the_failure(run: Run, folder: Path, tmp_path: Path) -> None:
    status, _, _ = run("calibrate", "./none", "--text", folder / "text.txt", "-o", tmp_path / "a" / "b")
    assert status == 1
    assert not list(tmp_path.iterdir())
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "clone" / ".git").mkdir(parents=True)
    (tmp_path / "clone" / "README.md").write_text("x")
    for name in ("model", "clone"):
        status, _, err = run("calibrate", "./none", "--text", folder / "text.txt", "-o", tmp_path / name)
        assert "no folder ./none" in err


@pytest.mark.slow
@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("failure", [HubError("the Hub is away"), KeyboardInterrupt()], ids=["error", "interrupted"])
def test_a_push_that_fails_keeps_the_calibration(
    run: Run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep: bool, failure: BaseException
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise failure

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "check_push", lambda repo_id: None)
    monkeypatch.setattr(Calibration, "push_to_hub", fail)
    more = ("-o", "kept") if keep else ()
    text = ("--text", folder / "text.txt", "--tokens", "256", "--metric", "identity")
    status, out, err = run("calibrate", "wiki11m", *text, "--push-to-hub", "me/my-calibration", *more)
    assert status == (1 if isinstance(failure, HubError) else 130)
    assert out == ""
    (kept,) = tmp_path.iterdir()
    assert err == f"error: {str(failure) or 'interrupted'}; the calibration is kept in {kept.name}\n"
    assert kept.name == "kept" if keep else kept.name.startswith("my-calibration-")
    assert len(Calibration.from_pretrained(kept).layers) == 6


def _nobody(api: Any) -> dict[str, Any]:
    raise LocalTokenNotFoundError("Token is required to call the /whoami-v2 endpoint, but no token found.")


def test_a_push_is_checked_first(run: Run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ("calibrate", "wiki11m", "--text", folder / "text.txt", "-o", tmp_path / "out", "--push-to-hub")
    status, _, err = run(*arguments, "not a name")
    assert (status, err.count("\n")) == (1, 1)
    assert err == "error: cannot push to not a name: repositories on the Hub are called OWNER/NAME\n"
    monkeypatch.setattr("huggingface_hub.HfApi.whoami", _nobody)
    status, _, err = run(*arguments, "me/model")
    assert "the upload of me/model needs a login: call 'hf auth login', or set HF_TOKEN" in err
    monkeypatch.setattr("huggingface_hub.HfApi.whoami", lambda self: {"name": "me", "orgs": [{"name": "us"}]})
    status, _, err = run(*arguments, "them/model")
    assert "cannot push to them/model: the token belongs to me, us, not to them" in err
    assert not (tmp_path / "out").exists()
    hub.check_push("me/model")
    hub.check_push("us/model")
    hub.check_push("model")


# ------------------------------------------------------- models without sense


@pytest.fixture(scope="module")
def broken() -> PreTrainedModel:
    """A model that gives NaN."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(llama_config(64, layers=6, max_position_embeddings=512)).eval()
    model.resize_token_embeddings(4096, mean_resizing=False)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    return model


@pytest.mark.slow
def test_models_that_give_nan(
    run: Run,
    folder: Path,
    tmp_path: Path,
    broken: PreTrainedModel,
    demo_tokenizer: PreTrainedTokenizerBase,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("calibrate", "analyze", "eval"):
        verb = sys.modules[f"quantcache.cli.{name}"]
        monkeypatch.setattr(verb, "load_model", lambda *args, **kwargs: (broken, demo_tokenizer))
    text = ("--text", folder / "held_out.txt")
    for metric in ("fisher", "query", "identity"):
        status, _, err = run("calibrate", "wiki11m", *text, "--metric", metric, "-o", tmp_path / "out", "--tokens", 512)
        assert status == 1
        assert "cannot be calibrated in float32: keys of layer 2 have NaN values" in err
    status, _, err = run("analyze", "wiki11m", *text, "-o", tmp_path / "report", "--tokens", 1024)
    assert (status, err.count("\n")) == (1, 1)
    status, _, err = run(
        "eval", "wiki11m", *text, "--methods", "dense,turboquant-mse-3", "--context", 128, "--tokens", 256
    )
    assert status == 1
    assert "no method could be measured" in err
    assert "not finite" in err
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------- chat


def test_chat(run: Run, folder: Path, tmp_path: Path) -> None:
    text = (data.demo_model_path() / "tokenizer_config.json").read_text("utf-8")
    for path in data.demo_model_path().iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "tokenizer_config.json").unlink()
    template = "{% for m in messages %}[{{ m.role }}] {{ m.content }} {% endfor %}[assistant] "
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(json.loads(text) | {"chat_template": template}), "utf-8")
    calibration = data.calibrations_path() / "wiki11m"
    asked = ("-c", calibration, "--prompt", "The city of Leiden", "--max-new-tokens", 2, "--json")
    counts = []
    for model, options, chat in (
        (tmp_path, (), True),
        (tmp_path, ("--chat",), True),
        (tmp_path, ("--no-chat",), False),
        ("wiki11m", (), False),
    ):
        status, out, err = run("generate", model, *asked, *options)
        assert status == 0, err
        found = json.loads(out)
        assert found["chat"] is chat
        counts.append(found["prompt_tokens"])
    assert counts[0] == counts[1] > counts[2] == counts[3]
    status, _, err = run("generate", "wiki11m", *asked, "--chat")
    assert (status, err) == (1, "error: wiki11m has no chat template: omit --chat\n")
