"""The commands of data_loader.py.

    python data_loader.py --download --data core50          fetch CORe50 (PNG files; --form npz: one big file)
    python data_loader.py --check --data core50 [--full]    is a folder of CORe50, or of own images, usable?
    python data_loader.py --download --dataset cifar100 --data DIR      the same for torchvision's data sets
    python data_loader.py --export-demo DIR                 write the demo's images, as a model for your own
"""
import argparse
import shlex
from pathlib import Path

from harness.console import begin_imports, end_imports, errors_as_sentences, safe_output


def parse_arguments(argv=None):
    """The arguments of a command line, as argparse gives them."""
    parser = argparse.ArgumentParser(prog="data_loader.py", description="Fetch or check the CORe50 data.")
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--download", action="store_true",
                        help="fetch what the folder lacks, or the rest of it")
    action.add_argument("--check", action="store_true",
                        help="print what the folder holds; exit 0 only if it is usable")
    action.add_argument("--export-demo", metavar="DIR", help="write the images of the demo into a new folder")
    parser.add_argument("--data", metavar="DIR", help="the data folder")
    parser.add_argument("--dataset", metavar="NAME",
                        help="a classification data set of torchvision (default: CORe50 or own images)")
    parser.add_argument("--form", choices=["png", "npz"], default="png",
                        help="PNG files or one npz file (default png)")
    parser.add_argument("--base-url", metavar="URL",
                        help="mirror that holds all files (default $CORE50_BASE_URL)")
    parser.add_argument("--full", action="store_true", help="--check looks at every image")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")

    args = parser.parse_args(argv)
    if args.export_demo is None and args.data is None:
        parser.error("the following arguments are required: --data")
    return args


def main(argv=None):
    """Does what a command line asks for. The exit status: 0 done, 1 failure, 2 bad input, 130 interrupted."""
    safe_output()
    args = parse_arguments(argv)

    if argv is None:  # a program of its own: Ctrl-C may end it right here
        begin_imports()
    from streams.download import download  # brings torch, which takes seconds
    end_imports()

    usable = True
    interrupted = "interrupted: the same command goes on from here"
    with errors_as_sentences("error", interrupted, args.debug) as outcome:
        if args.export_demo is not None:
            export_demo(args.export_demo)
        elif args.dataset is not None:
            usable = check_torchvision(args.dataset, args.data, args.download, args.full)
        else:
            if args.download:
                download(args.data, args.form, args.base_url)
            usable = check(args.data, args.full)
    return outcome.status if usable else 2


def export_demo(root):
    """Writes the demo's images into a new folder and says what is in it."""
    from streams import demo

    counts = demo.export_demo(root)
    print(f"{root} holds {counts['train']} images of {counts['classes']} classes in "
          f"{counts['batches']} batches to train with, {counts['test']} to test with: "
          f"`python ar1star_lat_replay.py --name folder --data {shlex.quote(str(root))}`")


def check(root, full=False):
    """Prints what a data folder holds; whether it is usable. full: look at every frame of CORe50.

    DataError if there is no such folder.
    """
    from data_loader import DataError, missing_data

    root = Path(root)
    if not root.is_dir():
        raise DataError(missing_data(root))

    usable = check_core50(root, full) if is_of_core50(root) else check_own_images(root)
    print(f"{root} is {'usable' if usable else 'NOT usable'}")
    return usable


def check_torchvision(name, root, download=False, full=False):
    """Prints what a folder holds of a data set of torchvision; whether it is usable.

    download: fetch it first, if it is not there; full: look at every image. Raises as TorchvisionStream.
    """
    from streams.torchvision_data import TorchvisionStream

    stream = TorchvisionStream(name, root, batches=1, download=download)
    names = f": {', '.join(stream.class_names)}" if stream.class_names else ""
    print(f"{root}: {stream.name}, {len(stream.batches[0])} images to train with, {len(stream.test)} to test "
          f"with, {stream.num_classes} classes{names}")
    for note in stream.notes():
        print(note)

    usable = True
    for message in stream.unreadable() if full else ():
        print(f"BAD: {message}")
        usable = False
    print(f"{root} is {'usable' if usable else 'NOT usable'}")
    return usable


def is_of_core50(root):
    """Whether a folder is CORe50's, known by anything of it, or an empty one; others are for own images."""
    from harness.config import holds_own_images  # brings yaml, which --help does without

    if holds_own_images(root):
        return False
    names = ("*.pkl", "core50*", "s[0-9]*/o[0-9]*")
    return any(any(root.glob(name)) for name in names) or not any(root.glob("[!.]*"))


def check_core50(root, full):
    """Prints a table of what a folder of CORe50 holds; whether all six scenarios can run from it."""
    from streams.download import examine

    usable = True
    print(f"{'item':12} {'found':60} status")
    for item, found, error in examine(root, full):
        print(f"{item:12} {found:60} {'ok' if error is None else f'BAD: {error}'}", flush=True)
        usable = usable and error is None
    return usable


def check_own_images(root):
    """Prints what a folder of own images holds, what is not read and what is damaged; whether nothing is."""
    from streams.folder import FolderStream

    stream = FolderStream(root)
    train = sum(len(batch) for batch in stream.listing)
    test = len(stream.test_listing)
    print(f"{root}: own images, {train} in {len(stream)} batches to train with, {test} to test with, "
          f"{stream.num_classes} classes: {', '.join(stream.class_names)}")
    for note in stream.notes():
        print(note)

    usable = True
    for message in stream.unreadable():
        print(f"BAD: {message}")
        usable = False
    return usable
