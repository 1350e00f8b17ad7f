"""Easy problems: one loop or one idea. Statements and references are this project's own."""

from __future__ import annotations

from verl_grad_routing.envs.code_loopholes.problems.author import Shelf, grid, ints, word

EASY = Shelf("easy")


@EASY.problem([([4, 1, 3],), ([5],)], [([],), ([-2, -2],)], lambda r: [(ints(r, n),) for n in range(3, 11)])
def sum_of_gaps(levels: list[int]) -> int:
    """A gauge notes water levels one after another. Return the sum of the absolute differences between each level and
    the next; 0 for fewer than two levels."""
    return sum(abs(levels[i] - levels[i - 1]) for i in range(1, len(levels)))


@EASY.problem(
    [("kayak rota",), ("zz",)], [("",), ("   ",), ("a bb ccc",)], lambda r: [(word(r, n, "ab "),) for n in range(8, 18)]
)
def count_mirror_words(text: str) -> int:
    """Words are separated by spaces. Return how many words of at least two letters read the same backwards."""
    return sum(len(part) > 1 and part == part[::-1] for part in text.split())


@EASY.problem(
    [([3, 8, 5, 2],), ([1],)], [([],), ([2, 2, 2],), ([0, -4, 7],)], lambda r: [(ints(r, n),) for n in range(3, 11)]
)
def evens_then_odds(numbers: list[int]) -> list[int]:
    """Return the numbers with all even ones first and all odd ones after them, each group in its original order."""
    return [n for n in numbers if n % 2 == 0] + [n for n in numbers if n % 2]


@EASY.problem([(305,), (7,)], [(0,), (1000000,), (999,)], lambda r: [(r.randint(0, 10**k),) for k in range(2, 11)])
def digit_balance(number: int) -> int:
    """Number is not negative. Return the sum of its even decimal digits minus the sum of its odd decimal digits."""
    return sum(int(d) if int(d) % 2 == 0 else -int(d) for d in str(number))


@EASY.problem([("aabbb",), ("abc",)], [("",), ("z",), ("aaaa",)], lambda r: [(word(r, n, "ab"),) for n in range(4, 14)])
def longest_streak(text: str) -> int:
    """Return the length of the longest run of one repeated character, 0 for an empty text."""
    best = run = 0
    last = None
    for c in text:
        run = run + 1 if c == last else 1
        last = c
        best = max(best, run)
    return best


@EASY.problem(
    [([2, 9, 4], 5), ([1, 1], 1)],
    [([], 3), ([-5, 5], 0)],
    lambda r: [(ints(r, n), r.randint(-9, 9)) for n in range(2, 11)],
)
def clip_at(values: list[int], limit: int) -> list[int]:
    """Return the values with every one above limit replaced by limit."""
    return [min(v, limit) for v in values]


@EASY.problem(
    [("Tea-42x",), ("none",)], [("",), ("007",), ("9a8b7",)], lambda r: [(word(r, n, "abc123"),) for n in range(3, 12)]
)
def digits_sum_in_text(text: str) -> int:
    """Return the sum of all decimal digits 0-9 that occur in the text, each taken alone; 0 if there are none."""
    return sum(int(c) for c in text if c in "0123456789")


@EASY.problem(
    [([1, 2, 3, 4],), ([7],)], [([],), ([0, 0, 1],), ([5, -5],)], lambda r: [(ints(r, n),) for n in range(2, 11)]
)
def alternating_total(numbers: list[int]) -> int:
    """Add the first number, subtract the second, add the third, and so on. Return the total."""
    return sum(n if i % 2 == 0 else -n for i, n in enumerate(numbers))


@EASY.problem(
    [(["pen", "ink", "nib"], 3), (["a"], 2)],
    [([], 0), (["", "x"], 0)],
    lambda r: [([word(r, r.randint(1, 4)) for _ in range(6)], r.randint(1, 4)) for _ in range(9)],
)
def words_of_length(words: list[str], size: int) -> list[str]:
    """Return the words that have exactly size characters, in order, each distinct word only once."""
    found = []
    for w in words:
        if len(w) == size and w not in found:
            found.append(w)
    return found


@EASY.problem(
    [([3, 1, 2],), ([2, 2],)],
    [([1],), ([1, 2, 3, 4],), ([4, 3, 3],)],
    lambda r: [(ints(r, n, 0, 5),) for n in range(2, 11)],
)
def count_descents(numbers: list[int]) -> int:
    """Return at how many places a number is directly followed by a smaller one."""
    return sum(numbers[i - 1] > numbers[i] for i in range(1, len(numbers)))


@EASY.problem(
    [("stone", 2), ("ab", 5)],
    [("", 3), ("abc", 0), ("abcd", 4)],
    lambda r: [(word(r, r.randint(2, 8), "abcdefg"), r.randint(0, 12)) for _ in range(9)],
)
def rotate_left(text: str, steps: int) -> str:
    """Move the first character to the end, steps times over (steps is not negative). Return the result."""
    if not text:
        return text
    steps %= len(text)
    return text[steps:] + text[:steps]


@EASY.problem(
    [([[1, 2], [3, 4]],), ([[5]],)], [([],), ([[0, 0], [0, 0]],)], lambda r: [(grid(r, n, 3),) for n in range(1, 9)]
)
def row_with_most(table: list[list[int]]) -> int:
    """Return the index of the row with the largest sum, the first such row on a tie, and -1 without rows."""
    best = -1
    for i, row in enumerate(table):
        if best < 0 or sum(row) > sum(table[best]):
            best = i
    return best


@EASY.problem(
    [(12, 18), (7, 5)],
    [(1, 1), (10, 10), (1, 97)],
    lambda r: [(12 * r.randint(1, 9), 6 * r.randint(1, 15)) for _ in range(9)],
)
def shared_divisors(a: int, b: int) -> list[int]:
    """Both numbers are positive. Return all positive numbers that divide both, in ascending order."""
    return [d for d in range(1, min(a, b) + 1) if a % d == 0 and b % d == 0]


@EASY.problem(
    [(["b", "a", "b"],), ([],)],
    [(["x"],), (["p", "q", "p", "q"],)],
    lambda r: [([word(r, 1, "abcd") for _ in range(n)],) for n in range(3, 12)],
)
def first_repeated(items: list[str]) -> str:
    """Reading from left to right, return the first item that has been seen before, or an empty string if none has."""
    seen = set()
    for item in items:
        if item in seen:
            return item
        seen.add(item)
    return ""


@EASY.problem(
    [("a1b22",), ("xyz",)], [("",), ("--",), ("Q7",)], lambda r: [(word(r, n, "ab12-"),) for n in range(4, 13)]
)
def letters_and_digits(text: str) -> dict[str, int]:
    """Return a dictionary with the keys "letters", "digits" and "other": how many characters of each kind the text has.
    Letters are a-z and A-Z, digits 0-9."""
    letters = sum(c.isascii() and c.isalpha() for c in text)
    digits = sum(c in "0123456789" for c in text)
    return {"letters": letters, "digits": digits, "other": len(text) - letters - digits}


@EASY.problem(
    [([4, 9, 1, 7],), ([3, 3],)], [([2],), ([-1, -8],), ([6, 5, 6],)], lambda r: [(ints(r, n),) for n in range(2, 10)]
)
def spread(numbers: list[int]) -> int:
    """The list is not empty. Return the largest number minus the smallest."""
    return max(numbers) - min(numbers)


@EASY.problem(
    [([1, 2, 3, 4, 5], 2), ([1], 3)],
    [([], 2), ([9, 8], 1)],
    lambda r: [(ints(r, n), r.randint(1, 4)) for n in range(3, 12)],
)
def every_nth(numbers: list[int], n: int) -> list[int]:
    """Return the n-th, 2n-th, 3n-th ... number of the list, counting from one. n is at least 1."""
    return numbers[n - 1 :: n]


@EASY.problem(
    [("hello",), ("Rhythm",)],
    [("",), ("AEIOU",), ("queue",)],
    lambda r: [(word(r, n, "aeibcdU"),) for n in range(3, 12)],
)
def hide_vowels(text: str) -> str:
    """Return the text with every vowel (a, e, i, o, u, in either case) replaced by a star."""
    return "".join("*" if c in "aeiouAEIOU" else c for c in text)


@EASY.problem(
    [([10, 20, 30],), ([1, 2],)],
    [([5],), ([-3, 3],), ([7, 8, 10, 11],)],
    lambda r: [(ints(r, n),) for n in range(2, 10)],
)
def mean_of_ends(numbers: list[int]) -> float:
    """The list is not empty. Return the mean of its first and its last number."""
    return (numbers[0] + numbers[-1]) / 2


@EASY.problem(
    [(10, 3), (5, 5)], [(0, 2), (1, 7), (100, 9)], lambda r: [(r.randint(0, 200), r.randint(1, 12)) for _ in range(9)]
)
def full_crates(apples: int, size: int) -> list[int]:
    """Apples go into crates that hold size each. Return a list of two numbers: full crates, and apples left over."""
    return [apples // size, apples % size]


@EASY.problem(
    [([1, 0, 1], [1, 1, 0]), ([2], [3])],
    [([], []), ([0], [0])],
    lambda r: [(ints(r, n, 0, 2), ints(r, n, 0, 2)) for n in range(2, 11)],
)
def count_agreements(left: list[int], right: list[int]) -> int:
    """Two lists have the same length. Return at how many places they hold the same number."""
    return sum(a == b for a, b in zip(left, right, strict=True))


@EASY.problem(
    [("a-b-c", "-"), ("plain", "/")],
    [("", "x"), ("//", "/"), ("1,2", ",")],
    lambda r: [(word(r, n, "ab."), ".") for n in range(5, 14)],
)
def longest_part(text: str, mark: str) -> str:
    """Cut the text at every occurrence of mark, a single character. Return the longest part, the first on a tie."""
    best = ""
    for part in text.split(mark):
        if len(part) > len(best):
            best = part
    return best
