"""The same emoji as drawn by two vendors, Noto Emoji and Twemoji: pairs, of which training sees no pair.

A base emoji and its variants (skin tones, genders, hair, direction) are on one side of the split, as are emoji that
one of the vendors draws alike to the byte, such as the flags of France and Clipperton. The split is a function of the
bases' names alone, so that it is the same for both vendors, on every machine and with or without skin tones.
"""

import hashlib
import itertools
import json
import re
from pathlib import Path
from typing import NamedTuple

from rdmd_fast.data.fetching import Collection, Content
from rdmd_fast.data.fetching.npm import Package, read_members
from rdmd_fast.errors import InputError

VENDORS = ("google", "twitter")
PACKAGES = (
    Package(
        "emoji-datasource-google",
        "16.0.0",
        "sha512-ZRexfzs7MVoLnmzZmNsO4TKhnAJp5D++Vm6PpUpH/jEQQlemp3l88CjZ+DoZ2faM9R4QxZkOPJCoT8DlPhfQ3A==",
    ),
    Package(
        "emoji-datasource-twitter",
        "16.0.0",
        "sha512-7F+uCuHH+7Qnrc15P5tnbvKkg9E6tlzi4MnT2uW1RlN4pLYTza6cP/dstIfSDMtpjFLWuZewWg8jBbuL2eyELQ==",
    ),
)
NOTICE = """\
google/: pictures of Noto Emoji, by Google.
    Licence: Apache License 2.0, https://www.apache.org/licenses/LICENSE-2.0
    Source: https://github.com/googlefonts/noto-emoji

twitter/: pictures of Twemoji, Copyright Twitter, Inc and other contributors.
    Licence: Creative Commons Attribution 4.0, https://creativecommons.org/licenses/by/4.0/
    Source: https://github.com/jdecked/twemoji

Both come, unchanged, from the npm packages {packages}
by Cal Henderson, whose own licence, for the data in emoji.json, is in LICENSE.txt.
"""

_PICTURE = re.compile(r"package/img/(?:google|twitter)/64/([0-9a-f]+(?:-[0-9a-f]+)*\.png)")
_LIST, _LICENSE = "package/emoji.json", "package/LICENSE"
_MOST_PICTURE_BYTES, _MOST_LIST_BYTES, _MOST_LICENSE_BYTES = 1 << 18, 1 << 24, 1 << 16

# -- Unicode's code points, in hexadecimal ---

_JOINER = "200D"
_TONES = {"1F3FB", "1F3FC", "1F3FD", "1F3FE", "1F3FF"}
_PLAIN = _TONES | {"FE0F"}  # tones, and the request for a coloured picture: left out everywhere
# Joined to a person they make a variant: ♀ and ♂, red, curly, white and no hair, →. Alone they are emoji themselves.
_JOINED = {"2640", "2642", "1F9B0", "1F9B1", "1F9B3", "1F9B2", "27A1"}
# People that have code points by gender, and the person of no gender.
_PERSON = {
    "1F468": "1F9D1",  # man
    "1F469": "1F9D1",  # woman
    "1F466": "1F9D2",  # boy
    "1F467": "1F9D2",  # girl
    "1F474": "1F9D3",  # old man
    "1F475": "1F9D3",  # old woman
    "1F934": "1FAC5",  # prince
    "1F478": "1FAC5",  # princess
    "1F57A": "1F483",  # the dancers
    "1F930": "1FAC4",  # pregnant woman
    "1FAC3": "1FAC4",  # pregnant man
    "1F936": "1F385",  # Mrs. and Mr. Claus
}
_MX_CLAUS, _CLAUS = "1F9D1-200D-1F384", "1F385"


class Picture(NamedTuple):
    """One emoji.

    Attributes:
        image: its file's name.
        unified: its code points in hexadecimal, ``A-B-C``.
        name: short, of the entry that lists it: a skin tone's is that of the plain form.
        order: its entry's place among all.
        also: code points of those that are the same but for the skin tone, or older or newer forms of it.
    """

    image: str
    unified: str
    name: str
    category: str
    order: int
    skin_tone: bool
    also: tuple[str, ...]

    @property
    def family(self) -> str:
        return family(self.unified)


def family(unified: str) -> str:
    """A sequence of code points, ``A-B-C``, without what makes a variant of it.

    Parts that are joined and alike stand once: a family with two children is a variant of one with one.
    """
    points = [_PERSON.get(point, point) for point in unified.upper().split("-") if point not in _PLAIN]
    first, *others = (part.strip("-") for part in "-".join(points).split(_JOINER))
    parts = [first, *(part for part in others if part not in _JOINED)]
    name = f"-{_JOINER}-".join(part for part, _ in itertools.groupby(parts))
    return _CLAUS if name == _MX_CLAUS else name


def bases(pictures: list[Picture], alike: list[list[str]]) -> dict[str, str]:
    """The name of the base of each picture, by its file's name.

    Args:
        alike: groups of files that shall have one base.
    """
    groups = _Groups()
    for picture in pictures:
        for other in (f"family {picture.family}", *(f"family {family(each)}" for each in picture.also)):
            groups.join(picture.image, other)
    for first, *others in alike:
        for other in others:
            groups.join(first, other)
    plainest: dict[str, Picture] = {}
    for picture in sorted(pictures, key=lambda each: (each.skin_tone, each.unified.count("-"), each.order)):
        plainest.setdefault(groups.root(picture.image), picture)
    return {picture.image: plainest[groups.root(picture.image)].name for picture in pictures}


class _Groups:
    """Disjoint groups of names that grow together."""

    def __init__(self):
        self._above: dict[str, str] = {}

    def root(self, name: str) -> str:
        while (above := self._above.setdefault(name, name)) != name:
            self._above[name] = self._above[above]
            name = above
        return name

    def join(self, first: str, second: str) -> None:
        self._above[self.root(first)] = self.root(second)


def held_out(names: set[str], share: float) -> set[str]:
    """A share of ``names`` by their hashes: of the same names always the same, and of a larger share a part.

    Raises:
        InputError: one side would be empty.
    """
    count = round(share * len(names))
    if not 0 < count < len(names):
        raise InputError(f"--holdout {share} of {len(names)} base emoji leaves one side empty; choose another share")
    return set(sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())[:count])


def emoji_content(archives: list[Path], options: dict) -> Content:
    """VENDOR/train/*.png and VENDOR/test/*.png of both vendors, with the same names.

    Args:
        archives: of ``PACKAGES``.
        options: "skin_tones", "keep" or "drop"; "holdout", a share of the base emoji.

    Raises:
        InputError: an archive is not what it should be, or one side of the split is empty.
    """
    members = [read_members(archive, _most_bytes) for archive in archives]
    drawn = [{match[1]: data for name, data in each.items() if (match := _PICTURE.fullmatch(name))} for each in members]
    listed = _read_list(members[0].get(_LIST, b""), archives[0].name)
    pictures = [picture for picture in listed if all(picture.image in each for each in drawn)]
    alike = [group for each in drawn for group in _alike(each, pictures)]
    base_of = bases(pictures, alike)
    test = held_out(set(base_of.values()), options["holdout"])
    kept = [picture for picture in pictures if options["skin_tones"] == "keep" or not picture.skin_tone]
    split_of = {picture.image: "test" if base_of[picture.image] in test else "train" for picture in kept}
    files = {
        f"{vendor}/{split}/{image}": each[image]
        for vendor, each in zip(VENDORS, drawn, strict=True)
        for image, split in split_of.items()
    }
    table = {
        picture.image: {
            "base": base_of[picture.image],
            "name": picture.name,
            "category": picture.category,
            "skin_tone": picture.skin_tone,
            "split": split_of[picture.image],
        }
        for picture in kept
    }
    files["emoji.json"] = (json.dumps(table, indent=1, ensure_ascii=False) + "\n").encode()
    files["NOTICE.txt"] = NOTICE.format(packages=" and ".join(map(str, PACKAGES))).encode()
    files["LICENSE.txt"] = members[0].get(_LICENSE, b"")
    count = list(split_of.values()).count("test")
    names = len(set(base_of.values()))
    summary = (
        f"{len(kept)} emoji by {len(VENDORS)} vendors: {len(kept) - count} to train and {count} to test "
        f"({len(test)} of {names} base emoji with their variants)"
    )
    return Content(files, summary)


def _most_bytes(name: str) -> int | None:
    if _PICTURE.fullmatch(name):
        return _MOST_PICTURE_BYTES
    return {_LIST: _MOST_LIST_BYTES, _LICENSE: _MOST_LICENSE_BYTES}.get(name)


def _read_list(data: bytes, where: str) -> list[Picture]:
    """All pictures that both vendors have by their list, those of skin tones behind the one that they vary."""
    pictures = []
    try:
        for entry in json.loads(data):
            also = tuple(entry[key] for key in ("obsoletes", "obsoleted_by") if entry.get(key))
            variants = entry.get("skin_variations", {}).values()
            for number, each in enumerate((entry, *variants)):
                if all(each[f"has_img_{vendor}"] for vendor in VENDORS):
                    named = (entry["short_name"], entry["category"], entry["sort_order"])
                    links = (entry["unified"],) if number else also
                    pictures.append(Picture(each["image"], each["unified"], *named, number > 0, links))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{where}: its list of emoji is not what it was ({error!r}), update rdmd_fast") from None
    return pictures


def _alike(drawn: dict[str, bytes], pictures: list[Picture]) -> list[list[str]]:
    """Groups of pictures that one vendor draws alike to the byte."""
    groups: dict[bytes, list[str]] = {}
    for picture in pictures:
        groups.setdefault(drawn[picture.image], []).append(picture.image)
    return [group for group in groups.values() if len(group) > 1]


EMOJI = Collection(PACKAGES, ("skin_tones", "holdout"), emoji_content)
