"""The noun classes of WordNet: dog → animal, bread → food, from its files where they are installed.

A word's class is the lexicographer file of its first noun sense, of 26. Words that are also a verb,
an adjective or an adverb are left out, as are those whose first sense was never met in the texts
that WordNet's authors tagged. A regular plural has its singular's class.

The files (`index.noun`, `data.noun`, …) come with Debian's package wordnet-base; nothing is
downloaded and none is part of this project.
Source: Fellbaum 1998, "WordNet"; file formats: its manual pages wndb(5WN) and lexnames(5WN).
"""

from __future__ import annotations

from pathlib import Path

FOLDER = Path("/usr/share/wordnet")
OTHER_KINDS = ("verb", "adj", "adv")
# Numbers 3 to 28 of lexnames(5WN).
CLASSES = (
    *("tops", "act", "animal", "artifact", "attribute", "body", "cognition", "communication"),
    *("event", "feeling", "food", "group", "location", "motive", "object", "person", "phenomenon"),
    *("plant", "possession", "process", "quantity", "relation", "shape", "state", "substance"),
    "time",
)
FIRST_CLASS = 3


class NounClasses:
    """Looks up words' classes in WordNet's files.

    Args:
        folder: that holds index.noun and data.noun; None: where Debian's package puts them.

    Errors: RuntimeError, with what installs it, where the files are not there.
    """

    def __init__(self, folder: str | None = None) -> None:
        self.folder = FOLDER if folder is None else Path(folder).expanduser()
        if not (self.folder / "index.noun").exists():
            raise RuntimeError(
                f"noun classes need WordNet's files; there is no index.noun in `{self.folder}`. "
                "Run `apt-get install wordnet-base`, or say with `eval.wordnet` where they are."
            )
        self._places = self._first_senses()
        self._classes: dict[str, int | None] = {}

    def __call__(self, word: str) -> int | None:
        """Return the number in CLASSES of a word in small letters; None where it has none."""
        if word not in self._classes:
            found = self._places.get(word)
            if found is None and word.endswith("s"):
                found = self._places.get(word[:-1])
            self._classes[word] = None if found is None else self._class_at(found)
        return self._classes[word]

    def _first_senses(self) -> dict[str, int]:
        """Return where in data.noun the first sense of each word that is only a noun begins."""
        others = {word for kind in OTHER_KINDS for word, _ in self._entries(f"index.{kind}")}
        return {
            word: int(fields[-n_senses])
            for word, fields in self._entries("index.noun")
            for n_senses in [int(fields[2])]
            if word not in others and int(fields[-n_senses - 1]) > 0
        }

    def _entries(self, name: str) -> list[tuple[str, list[str]]]:
        path = self.folder / name
        if not path.exists():
            return []
        # The licence stands above, on lines that begin with spaces.
        lines = path.read_text(encoding="latin-1").splitlines()
        split = [line.split() for line in lines if line and not line.startswith(" ")]
        return [(fields[0], fields) for fields in split if fields[0].isalpha()]

    def _class_at(self, place: int) -> int | None:
        with (self.folder / "data.noun").open("rb") as file:
            file.seek(place)
            fields = file.read(16).split()
        number = int(fields[1]) - FIRST_CLASS
        return number if 0 <= number < len(CLASSES) else None
