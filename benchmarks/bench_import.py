"""What ``import refattn`` costs, in a fresh interpreter."""


class Import:
    """Seconds from nothing to the imported name."""

    def timeraw_import(self):
        """``import refattn`` alone: no Numba, no framework."""
        return "import refattn"

    def timeraw_first_small_call(self):
        """The import, the whole catalogue, and a call small enough to run as plain Python."""
        return """
        import numpy as np
        import refattn as ra
        x = np.ones((1, 1, 2, 2))
        ra.attention(x, x, x)
        """
