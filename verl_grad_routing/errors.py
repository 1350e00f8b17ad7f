"""One kind of error for everything a user can get wrong: it names the key, the value and the fix, in one line."""

from __future__ import annotations


class UserError(ValueError):
    """Bad input, told in one line.

    Args:
        key: The configuration key, file or field at fault, spelled as the user would write it.
        value: What was found there.
        fix: What to do about it, as an instruction.
    """

    def __init__(self, key: str, value: object, fix: str):
        self.key, self.value, self.fix = key, value, fix
        super().__init__(key, value, fix)  # all three, so that the error survives pickling between processes

    def __str__(self) -> str:
        return f"{self.key}={self.value!r}: {self.fix}"
