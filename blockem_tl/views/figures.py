"""`Figure`: matplotlib's figure, which shows itself as the last line of a notebook's cell."""

import io

from matplotlib.figure import Figure as _Figure


class Figure(_Figure):
    """A matplotlib figure without pyplot: nothing global, and any backend can show it.

    IPython draws matplotlib's own figures only once pyplot has been imported; until then a cell would show their name and size.
    """

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=80)
        return buffer.getvalue()
