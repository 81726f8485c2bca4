"""Tables in Markdown, and their numbered remarks."""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass
class Notes:
    """Numbered remarks, each said once."""

    texts: list[str]

    def mark(self, *remarks: str) -> str:
        """The numbers of the remarks, raised."""
        numbers = []
        for remark in remarks:
            if remark not in self.texts:
                self.texts.append(remark)
            numbers.append(self.texts.index(remark) + 1)
        raised = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")
        return " ".join(str(number).translate(raised) for number in sorted(set(numbers)))


def table(header: list[str], rows: Iterable[list[str]]) -> str:
    lines = [header, ["---", *[":-:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
