"""`Result`: how every result of the library shows itself."""

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

from blockem_tl.views import tables

if TYPE_CHECKING:
    import pandas as pd

_LONGEST = 300  # characters of the one line


class Result(ABC):
    """A result shows itself: one line in a console, a table when printed or in a notebook, a data frame, a figure.

    A class gives `headline` and `to_frame`; most also have ``plot()``, which returns a matplotlib figure.
    """

    _most_rows: ClassVar[int] = tables.MOST_ROWS

    @abstractmethod
    def headline(self) -> str:
        """The result in one line."""

    @abstractmethod
    def to_frame(self) -> "pd.DataFrame":
        """The result as a data frame."""

    def __repr__(self) -> str:
        text = f"{type(self).__name__}({self.headline()})"
        return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 4]}...)"

    def __str__(self) -> str:
        return f"{self!r}\n{tables.text(self._shown(), rows=self._most_rows)}"

    def _repr_html_(self) -> str:
        return tables.html(self._shown(), caption=repr(self), rows=self._most_rows)

    def _shown(self) -> "pd.DataFrame":
        """What is shown of the frame: all of it, unless a class has columns or rows that are for further work only."""
        return self.to_frame()
