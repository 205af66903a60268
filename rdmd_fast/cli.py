"""The ``rdmd`` command. Each subcommand's module is imported when it is called."""

import argparse
import importlib
import sys

from rdmd_fast.errors import EXIT_BAD_INPUT, InputError
from rdmd_fast.files import print_any_text
from rdmd_fast.processes.entry import prepare_process, system_input_error

# name -> (module with add_arguments(parser) and run(arguments) -> exit status, one line of help)
COMMANDS = {
    "fetch": ("rdmd_fast.commands.fetch", "download emoji or digits to try rdmd with, by npm"),
    "pack": ("rdmd_fast.commands.pack", "write digits, an image folder or a toy as WebDataset shards"),
    "import-edm": ("rdmd_fast.commands.import_edm", "turn an NVIDIA EDM pickle into a teacher's export"),
    "sample": ("rdmd_fast.commands.sample", "draw samples from a teacher, to look at it before distilling"),
    "export": ("rdmd_fast.commands.export", "take a network out of any checkpoint of a run, also of a killed one"),
    "translate": ("rdmd_fast.commands.translate", "translate images with a trained generator"),
    "evaluate": (
        "rdmd_fast.commands.evaluate",
        "measure translated images, or a toy run against its closed form and exact transport",
    ),
    "baseline": ("rdmd_fast.commands.baseline", "translate by SDEdit, ILVR, EGSDE, DDIB or CycleDiffusion"),
    "figures": ("rdmd_fast.commands.figures", "make the paper's figures and their tables from runs"),
    "report": ("rdmd_fast.commands.report", "write one page of HTML about runs: curves, pictures, validation, events"),
    "sweep": (
        "rdmd_fast.commands.sweep",
        "help to choose λ and generator_sigma: short runs, a picture, a recommendation",
    ),
}


def main(argv: list[str] | None = None) -> int:
    if argv is None:
        prepare_process()
        argv = sys.argv[1:]
    else:
        print_any_text()
    parser = argparse.ArgumentParser(prog="rdmd", description="One-step unpaired image-to-image translation by RDMD.")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, (module, summary) in COMMANDS.items():
        subparser = subparsers.add_parser(
            name, help=summary, description=summary, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        if argv and argv[0] == name:
            command = importlib.import_module(module)
            command.add_arguments(subparser)
            subparser.set_defaults(execute=command.run)
    arguments = parser.parse_args(argv)
    try:
        return arguments.execute(arguments)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except BrokenPipeError:
        return 1
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130  # as shells have it of SIGINT
    except (OSError, MemoryError, UnicodeEncodeError) as error:
        bad_input = system_input_error(error)
        if bad_input is None:
            raise
        print(f"error: {bad_input}", file=sys.stderr)
        return EXIT_BAD_INPUT


if __name__ == "__main__":
    sys.exit(main())
