"""minBLIP-2: BLIP-2 (arXiv 2301.12597) from scratch, small enough to read in one sitting."""

__version__ = "0.1.0"


class UserError(ValueError):
    """Something the user gave cannot be used; the message is one sentence that names it and says what to do."""
