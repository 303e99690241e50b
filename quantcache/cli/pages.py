"""Help pages: verbs and options in groups, each default beside its option, and examples where the page ends."""

from __future__ import annotations

import inspect
import re
import textwrap
from typing import Any

from typer import BadParameter
from typer.core import TyperCommand, TyperGroup

MODEL = "Model"
CACHE = "Cache"
HUB = "Hub"
GENERAL = "General options"
"""Groups of options that several verbs have; what belongs to none stands first."""

SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 100}
"""Context settings of the command line and of every verb."""

FORMER_NAMES = re.compile(r", --(?:metrics|out|weights-format)(?![\w-])")
"""What options were called before: they go on working, and no page shows them."""

OPTIONS = "[OPTIONS]"

WIDEST = 28
"""The widest name that its meaning stands beside."""

_EXAMPLES = "\nExamples:\n"


class WrongUsage(Exception):
    """The command line asks for what makes no sense: a message that names the options, and exit status 2."""

    ctx: Any = None

    def format_message(self) -> str:
        """The message, by the name under which click's errors have it."""
        return str(self)


class Verb(TyperCommand):
    """A verb, whose docstring may end in a section ``Examples:``."""

    def __init__(self, *args: Any, **more: Any):
        super().__init__(*args, **more)
        text, _, examples = (self.help or "").partition(_EXAMPLES)
        self.help, self.examples = text.strip(), inspect.cleandoc(examples).splitlines()

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """What a call cannot do without, unless the verb says that itself, then where all else goes."""
        if self.options_metavar != OPTIONS:
            return [str(self.options_metavar)]
        found = []
        params: list[Any] = self.get_params(ctx)
        for each in params:
            name = each.metavar or each.name.upper()
            if each.param_type_name == "argument":
                found += [] if each.hidden else [name if each.required else f"[{name}]"]
            elif each.required:
                found.append(f"{min(each.opts, key=len)} {name}")
        return [*found, OPTIONS]

    def invoke(self, ctx: Any) -> Any:
        """Run the verb; wrong usage that it finds itself is as well placed as what the parser finds."""
        try:
            return super().invoke(ctx)
        except (WrongUsage, BadParameter) as error:
            error.ctx = getattr(error, "ctx", None) or ctx
            raise

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the groups, those of this verb first."""
        groups: dict[str, list[tuple[str, str]]] = {}
        params: list[Any] = self.get_params(ctx)
        for each in params:
            record = each.get_help_record(ctx)
            if record is None:
                continue
            name, text = _readable(*record)
            if each.param_type_name == "argument":  # the usage says whether it is required, and its type is no news
                group, name, text = "Arguments", each.metavar, text.removesuffix("[required]").rstrip()
            elif "--help" in each.opts:
                group = GENERAL
            else:
                group = getattr(each, "rich_help_panel", None) or "Options"
            groups.setdefault(group, []).append((name, text))
        for name in sorted(groups, key=lambda name: (name == GENERAL, name not in ("Arguments", "Options"))):
            with formatter.section(name):
                _write_rows(formatter, groups[name])

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Write the examples, each in its own lines."""
        if self.examples:
            with formatter.section("Examples"):
                formatter.write("".join(f"{'':{formatter.current_indent}}{line}\n" for line in self.examples))


class Verbs(TyperGroup):
    """The command line: its verbs in groups."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the verbs, then the few options that they share."""
        groups: dict[str, list[tuple[str, str]]] = {}
        for name in self.list_commands(ctx):
            verb = self.get_command(ctx, name)
            if verb is not None and not verb.hidden:
                group = getattr(verb, "rich_help_panel", None) or "Commands"
                groups.setdefault(group, []).append((name, verb.short_help or ""))
        wide = max((len(name) for rows in groups.values() for name, _ in rows), default=0)
        for group, rows in groups.items():
            with formatter.section(group):
                _write_rows(formatter, [(f"{name:{wide}}", text) for name, text in rows])
        records = [each.get_help_record(ctx) for each in self.get_params(ctx)]
        with formatter.section("Options"):
            _write_rows(formatter, [record for record in records if record is not None])


def _readable(name: str, text: str) -> tuple[str, str]:
    """An option as pages show it: what may be chosen stands with its meaning, and defaults without brackets."""
    name, text = FORMER_NAMES.sub("", name), text.replace(r"\[", "[")  # earlier typers escape it for rich
    text = re.sub(r"\[default: \((.*)\)(; [^()]*)?\]$", r"[default: \1\2]", text)
    option, found, choices = name.partition(" <")
    if not found or "|" not in choices:
        return name, text
    before, bracket, after = text.partition("  [")
    listed = f"one of {choices.rstrip('>').replace('|', ', ')}"
    what = option.rpartition("-")[2].upper()
    return f"{option} {what}", f"{before}  [{listed}{'; ' + after if bracket else ']'}"


def _write_rows(formatter: Any, rows: list[tuple[str, str]]) -> None:
    """Write names and what they mean in two columns; unlike click's, words with hyphens stay whole."""
    wide = min(max(len(name) for name, _ in rows), WIDEST)
    room = max(formatter.width - formatter.current_indent - wide - 2, 20)
    indent = " " * formatter.current_indent
    for name, text in rows:
        lines = textwrap.wrap(text, room, break_on_hyphens=False) or [""]
        if len(name) > wide:
            formatter.write(f"{indent}{name}\n")
            name = ""
        for line in lines:
            formatter.write(f"{indent}{name:{wide}}  {line}".rstrip() + "\n")
            name = ""


def refusal(error: Any) -> str:
    """What is said of wrong usage, and where the page is that would have prevented it.

    Args:
        error: An exception of click, of typer's own copy of it, or :class:`WrongUsage`.

    Returns:
        A sentence.
    """
    context = getattr(error, "ctx", None)
    page = "quantcache" if context is None else context.command_path
    message = str(error.format_message()).replace(": Value error, ", ": ").rstrip(".")
    flaws = getattr(
        error.__cause__, "errors", None
    )  # pydantic's, by which typer reads numbers; it leaves out what was given
    if flaws is not None:
        message = message.replace(": Input should be ", f": {flaws()[0]['input']!r} should be ", 1)
    return f"{message} (see {page} --help)"
