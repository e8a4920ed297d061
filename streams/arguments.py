"""The command line of data_loader.py, to be read before the imports that take long.

    answer_at_once()        # ends the program after --help or a mistake

Uses lab.start.
"""
import argparse

from lab.start import begin_imports


def parse_arguments(argv=None):
    """The arguments of a command line, as argparse gives them."""
    parser = argparse.ArgumentParser(prog="data_loader.py", description="Fetch or check the CORe50 data.")
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--download", action="store_true", help="fetch what the folder lacks, or the rest of it")
    action.add_argument("--check", action="store_true", help="print what the folder holds; exit 0 only if it is usable")
    action.add_argument("--export-demo", metavar="DIR", help="write the images of the demo into a new folder")
    parser.add_argument("--data", metavar="DIR", help="the data folder")
    parser.add_argument("--form", choices=["png", "npz"], default="png", help="PNG files or one npz file (default png)")
    parser.add_argument("--base-url", metavar="URL", help="mirror that holds all files (default $CORE50_BASE_URL)")
    parser.add_argument("--full", action="store_true", help="--check looks at every image")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args(argv)
    if args.export_demo is None and args.data is None:
        parser.error("the following arguments are required: --data")
    return args


def answer_at_once():
    """Ends the program if its command line asks for --help, or for nothing possible; else the imports may begin."""
    begin_imports()
    parse_arguments()
