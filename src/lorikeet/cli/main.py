"""`lorikeet VERB ...`: find the verb, run it, turn errors into exit codes.

Exit codes: 0 done, 1 a bug of ours, 2 the user's input, 3 a check that was asked for did not hold.
Only what a verb needs is imported, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import difflib
import errno
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import NoReturn, Protocol

VERBS = {
    "demo": "everything, on the embedded model, in minutes",
    "train": "fine-tune a model on a data file",
    "eval": "measure a model, with or without an adapter",
    "preview": "show what will be trained on, tokens coloured by mask",
    "plan": "parameters, memory and time before anything runs",
    "compare": "base, LoRA and full fine-tuning under one protocol",
    "sweep": "ranks x rows x seeds ..., every combination measured alike",
    "doctor": "what is wrong with a run or could be better, with the figures that say so",
    "generate": "answer prompts",
    "adapter inspect": "what an adapter does to which modules, and how it was made",
    "adapter combine": "sum, subtract, scale or merge adapters into one",
    "adapter normalize": "rewrite an adapter as plain LoRA that every runtime scales alike",
    "adapter merge": "write a model with an adapter folded into its weights",
    "export gguf": "a model, or base and adapter, as one file for llama.cpp, with proof",
    "export hf": "the merged model folder (the same as adapter merge)",
    "export ollama": "a folder for `ollama create`: the GGUF file and its Modelfile",
    "adapter push": "upload an adapter to the Hugging Face hub",
}


class Verb(Protocol):
    """What the module of a verb offers."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the verb's flags."""

    def run(self, args: argparse.Namespace) -> int:
        """Do it; return the exit code."""


class Parser(argparse.ArgumentParser):
    """argparse, whose errors suggest the flag that was probably meant."""

    def error(self, message: str) -> NoReturn:
        """Print the problem on stderr and exit with 2."""
        self.exit(2, f"error: {message}\nTry: {self.prog} --help\n")

    def parse_strictly(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parse; every unknown flag is reported, each with the nearest known one."""
        args, unknown = self.parse_known_args(argv)
        if unknown:
            known = sorted(self._option_string_actions)
            self.error("; ".join(_unknown(flag, known) for flag in unknown))
        return args


def _unknown(flag: str, known: list[str]) -> str:
    name = flag.split("=")[0]
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"unknown argument {name}" + (f" (did you mean {near[0]}?)" if near else "")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(_overview())
        return 0 if argv else 2
    if argv[0] == "--version":
        print(_version())
        return 0
    words = 2 if any(name.startswith(f"{argv[0]} ") for name in VERBS) else 1
    name = " ".join(argv[:words])
    if words == 2 and argv[1:2] in ([], ["-h"], ["--help"]):
        print(_overview(f"{argv[0]} "))
        return 0 if argv[1:] else 2
    if name not in VERBS:
        print(f"error: {_unknown(name, list(VERBS))}\n\n{_overview()}", file=sys.stderr)
        return 2
    return _run(name, argv[words:])


def _run(name: str, argv: Sequence[str]) -> int:
    verb: Verb = import_module(f"lorikeet.cli.{name.replace(' ', '_')}")
    parser = Parser(prog=f"lorikeet {name}", description=VERBS[name], allow_abbrev=False)
    verb.add_arguments(parser)
    args = parser.parse_strictly(argv)
    from lorikeet import console
    from lorikeet.errors import ConfigError, LorikeetError

    try:
        return verb.run(args)
    except LorikeetError as error:
        console.fail(error)
        return error.exit_code
    except KeyboardInterrupt:
        console.warn("interrupted; what was saved is complete")
        return 130
    except BrokenPipeError:  # `| head` closed the pipe
        sys.stderr.close()
        return 0
    except OSError as error:
        if error.errno not in (errno.ENAMETOOLONG, errno.ELOOP):
            raise
        refused = f"the system takes no such name ({error.strerror}): {error.filename}"
        console.fail(ConfigError(refused))
        return ConfigError.exit_code


def _overview(start: str = "") -> str:
    """The verbs whose names start so."""
    shown = {name: text for name, text in VERBS.items() if name.startswith(start)}
    width = max(map(len, shown))
    verbs = "\n".join(f"  {name:{width}}  {text}" for name, text in shown.items())
    return (
        "usage: lorikeet VERB [OPTIONS]\n\n"
        "LoRA fine-tuning of small language models, with numbers to be trusted.\n\n"
        f"{verbs}\n\n"
        "lorikeet VERB --help tells a verb's options; lorikeet --version the version."
    )


def _version() -> str:
    try:
        return f"lorikeet {version('lorikeet')}"
    except PackageNotFoundError:
        return "lorikeet (not installed)"
