"""Hard problems: dynamic programming, graphs, careful cases. Statements and references are this project's own."""

from __future__ import annotations

from verl_grad_routing.envs.code_loopholes.problems.author import Shelf, grid, ints, word

HARD = Shelf("hard")


@HARD.problem(
    [("kitten", "sitting"), ("", "ab")],
    [("", ""), ("abc", "acb"), ("same", "same")],
    lambda r: [(word(r, n, "abc"), word(r, r.randint(1, 9), "abc")) for n in range(2, 11)],
)
def typing_cost(first: str, second: str) -> int:
    """Turn first into second. Inserting a character costs 2, deleting one costs 1, replacing one costs 2. Return the
    least total cost."""
    row = [2 * j for j in range(len(second) + 1)]
    for i, a in enumerate(first, 1):
        new = [i]
        for j, b in enumerate(second, 1):
            new.append(min(new[j - 1] + 2, row[j] + 1, row[j - 1] + (0 if a == b else 2)))
        row = new
    return row[-1]


@HARD.problem(
    [([[0, 1], [2, 0]],), ([[3]],)],
    [([[1, 1, 1], [9, 9, 1], [1, 1, 1]],), ([[0, 0], [0, 0]],)],
    lambda r: [(grid(r, a, b),) for a in (2, 3, 4) for b in (3, 4, 5)],
)
def cheapest_path(cost: list[list[int]]) -> int:
    """Every cell of a rectangular grid has a cost of 0 to 9, paid on entering and for the first cell too. Moves go one
    cell up, down, left or right. Return the least cost from the top left to the bottom right cell."""
    rows, columns = len(cost), len(cost[0])
    best = {(0, 0): cost[0][0]}
    todo = [(cost[0][0], 0, 0)]
    while todo:
        todo.sort(reverse=True)
        spent, i, j = todo.pop()
        if spent > best[i, j]:
            continue
        for a, b in ((i + 1, j), (i - 1, j), (i, j + 1), (i, j - 1)):
            if 0 <= a < rows and 0 <= b < columns:
                total = spent + cost[a][b]
                if total < best.get((a, b), total + 1):
                    best[a, b] = total
                    todo.append((total, a, b))
    return best[rows - 1, columns - 1]


@HARD.problem(
    [("2+3*4",), ("(1+2)*3",)],
    [("7",), ("8-3-2",), ("2*(3-(4-1))",)],
    lambda r: (
        [
            ("".join(f"{r.randint(0, 9)}{r.choice('+-*')}" for _ in range(n)) + str(r.randint(1, 9)),)
            for n in range(2, 8)
        ]
        + [
            (f"({r.randint(1, 9)}-{r.randint(1, 9)})*{r.randint(1, 9)}-({r.randint(1, 9)}+{r.randint(1, 9)})",)
            for _ in range(4)
        ]
    ),
)
def evaluate(expression: str) -> int:
    """An expression has digits 0-9 as single numbers, the operators + - *, and round brackets, without spaces. Products
    go before sums and differences; otherwise the order is from left to right. Return the value."""
    position = 0

    def factor():
        nonlocal position
        if expression[position] == "(":
            position += 1
            value = total()
            position += 1
            return value
        position += 1
        return int(expression[position - 1])

    def product():
        nonlocal position
        value = factor()
        while position < len(expression) and expression[position] == "*":
            position += 1
            value *= factor()
        return value

    def total():
        nonlocal position
        value = product()
        while position < len(expression) and expression[position] in "+-":
            sign = 1 if expression[position] == "+" else -1
            position += 1
            value += sign * product()
        return value

    return total()


@HARD.problem(
    [([3, 2, 5, 10, 7],), ([5],)],
    [([],), ([1, 1, 1, 1],), ([9, 1, 1, 9],)],
    lambda r: [(ints(r, n, 1, 20),) for n in range(3, 13)],
)
def best_harvest(trees: list[int]) -> int:
    """Trees stand in a circle; picking one spoils both of its neighbours, which then cannot be picked. Return the
    largest total that can be picked."""

    def line(row):
        take = skip = 0
        for tree in row:
            take, skip = skip + tree, max(take, skip)
        return max(take, skip)

    if len(trees) < 2:
        return sum(trees)
    return max(line(trees[1:]), line(trees[:-1]))


@HARD.problem(
    [(["a<b", "b<c"],), (["x<y", "y<x"],)],
    [([],), (["b<a", "c<a"],), (["d<a", "c<b"],)],
    lambda r: (
        [([f"{a}<{b}" for a, b in (sorted(r.sample("abcdef", 2)) for _ in range(n))],) for n in range(2, 8)]
        + [([f"{a}<{b}" for a, b in (r.sample("abcd", 2) for _ in range(n))],) for n in range(2, 6)]
    ),
)
def dressing_order(rules: list[str]) -> str:
    """A rule "a<b" says that a comes before b (names are single letters). Return all names that occur, in an order that
    keeps every rule, and of all such orders the first in the alphabet; an empty string if there is none."""
    pairs = [rule.split("<") for rule in rules]
    names = {name for pair in pairs for name in pair}
    out = ""
    while names:
        free = [n for n in sorted(names) if not any(b == n and a in names for a, b in pairs)]
        if not free:
            return ""
        out += free[0]
        names.remove(free[0])
    return out


@HARD.problem(
    [([1, 5, 11, 5],), ([1, 2, 4],)],
    [([],), ([3],), ([2, 2, 2],)],
    lambda r: [(ints(r, n, 1, 25),) for n in range(3, 12)],
)
def fairest_split(weights: list[int]) -> int:
    """Divide positive weights between two pans. Return the smallest possible difference of the two totals."""
    sums = {0}
    for w in weights:
        sums |= {s + w for s in sums}
    return min(abs(sum(weights) - 2 * s) for s in sums)


@HARD.problem(
    [("bananas",), ("abcd",)], [("",), ("aaaa",), ("abab",)], lambda r: [(word(r, n, "ab"),) for n in range(4, 14)]
)
def longest_repeated_part(text: str) -> str:
    """Return the longest part of the text that occurs at two different places at least (they may overlap); of several
    the first in the alphabet, an empty string if no character occurs twice."""
    for size in range(len(text) - 1, 0, -1):
        parts = [text[i : i + size] for i in range(len(text) - size + 1)]
        twice = [part for part in parts if parts.count(part) > 1]
        if twice:
            return min(twice)
    return ""


@HARD.problem([(4,), (1,)], [(0,), (2,), (10,), (30,)], lambda r: [(n,) for n in (3, 5, 6, 7, 8, 12, 17, 23)])
def tilings(length: int) -> int:
    """A strip is length cells long. Fill it with tiles of 1, 2 and 3 cells; two tiles of 3 cells may not lie next to
    each other. Return the number of ways (1 for length 0)."""
    free = [0] * (length + 4)
    after = [0] * (length + 4)
    free[0] = 1
    for n in range(length):
        total = free[n] + after[n]
        free[n + 1] += total
        free[n + 2] += total
        after[n + 3] += free[n]
    return free[length] + after[length]


@HARD.problem(
    [([2, 1, 5, 6, 2, 3],), ([4],)],
    [([],), ([1, 1, 1],), ([3, 0, 3],)],
    lambda r: [(ints(r, n, 0, 9),) for n in range(3, 13)],
)
def largest_poster(heights: list[int]) -> int:
    """Boards of width 1 and the given heights stand side by side on the floor. Return the area of the largest upright
    rectangle that is covered by boards entirely."""
    best = 0
    for i in range(len(heights)):
        low = heights[i]
        for j in range(i, len(heights)):
            low = min(low, heights[j])
            best = max(best, low * (j - i + 1))
    return best


@HARD.problem(
    [([[1, 3, 5], [2, 4, 6]],), ([[1, 2, 9]],)],
    [([],), ([[1, 10, 5], [2, 3, 4], [4, 9, 4]],), ([[1, 2, 1], [2, 3, 1]],)],
    lambda r: [([[a, a + r.randint(1, 6), r.randint(1, 9)] for a in ints(r, n, 0, 15)],) for n in range(2, 11)],
)
def best_bookings(offers: list[list[int]]) -> int:
    """An offer [start, end, pay] needs the hall from start to end. Offers may touch but not overlap. Return the largest
    total pay of offers that can all be accepted."""
    done = []
    for start, end, pay in sorted(offers, key=lambda offer: offer[1]):
        before = max((value for finish, value in done if finish <= start), default=0)
        done.append((end, max(before + pay, done[-1][1] if done else 0)))
    return done[-1][1] if done else 0


@HARD.problem(
    [("a?c", "abc"), ("a*", "b")],
    [("", ""), ("*", ""), ("?*?", "x"), ("*ab*", "caab")],
    lambda r: [(word(r, r.randint(1, 5), "ab?*"), word(r, n, "ab")) for n in range(1, 7) for _ in range(2)],
)
def pattern_fits(pattern: str, text: str) -> bool:
    """In a pattern ? stands for exactly one character and * for any number of characters, also none; others stand for
    themselves. Return whether the pattern fits the whole text."""
    row = [True] + [False] * len(text)
    for p in pattern:
        new = [row[0] and p == "*"]
        for j, c in enumerate(text):
            new.append(row[j + 1] or new[j] if p == "*" else row[j] and p in ("?", c))
        row = new
    return row[-1]


@HARD.problem(
    [([3, 1, 2], 2), ([1, 1], 5)],
    [([], 1), ([4, 4, 4], 3), ([0, 5], 0)],
    lambda r: [(ints(r, n, -4, 6), r.randint(1, 6)) for n in range(4, 13)],
)
def windows_divisible(numbers: list[int], divisor: int) -> int:
    """Return how many non-empty stretches of neighbouring numbers have a sum that divisor divides. With divisor 0,
    count the stretches whose sum is 0."""
    count = 0
    for i in range(len(numbers)):
        total = 0
        for n in numbers[i:]:
            total += n
            count += total % divisor == 0 if divisor else total == 0
    return count


@HARD.problem(
    [("XIV",), ("MCMXC",)],
    [("I",), ("MMMCMXCIX",), ("CDXLIV",)],
    lambda r: [
        (
            "M" * r.randint(0, 3)
            + r.choice(["", "C", "CD", "DCC", "CM"])
            + r.choice(["X", "XL", "LXX", "XC"])
            + r.choice(["I", "IV", "VII", "IX"]),
        )
        for _ in range(12)
    ],
)
def next_roman(numeral: str) -> str:
    """The numeral is a Roman number from 1 to 3999 in standard form. Return the Roman number after it; an empty string
    after 3999."""
    signs = [(1000, "M"), (900, "CM"), (500, "D"), (400, "CD"), (100, "C"), (90, "XC"), (50, "L"), (40, "XL")]
    signs += [(10, "X"), (9, "IX"), (5, "V"), (4, "IV"), (1, "I")]
    value, rest = 0, numeral
    for worth, sign in signs:
        while rest.startswith(sign):
            value += worth
            rest = rest[len(sign) :]
    value += 1
    if value > 3999:
        return ""
    out = ""
    for worth, sign in signs:
        while value >= worth:
            out += sign
            value -= worth
    return out


@HARD.problem(
    [([[1, 2, 4], [2, 3, 1], [1, 3, 7]], 1, 3), ([], 1, 2)],
    [([[1, 2, 3]], 2, 1), ([[1, 2, 5], [2, 1, 5]], 1, 1)],
    lambda r: [
        ([[r.randint(1, 5), r.randint(1, 5), r.randint(1, 9)] for _ in range(n)], 1, r.randint(2, 5))
        for n in range(4, 15)
    ],
)
def quickest_route(roads: list[list[int]], start: int, goal: int) -> int:
    """A road [a, b, t] leads from place a to place b, in that direction only, and takes time t. Return the least time
    from start to goal, 0 if they are the same, -1 if there is no way."""
    best = {start: 0}
    for _ in range(len(roads) + 1):
        for a, b, t in roads:
            if a in best and best[a] + t < best.get(b, best[a] + t + 1):
                best[b] = best[a] + t
    return best.get(goal, -1)


@HARD.problem(
    [("ABCBDAB", "BDCABA"), ("abc", "xyz")],
    [("", "a"), ("aaa", "aa"), ("abcd", "abcd")],
    lambda r: [(word(r, n, "abc"), word(r, n, "abc")) for n in range(3, 12)],
)
def shared_thread(first: str, second: str) -> int:
    """Leave out characters of both texts, keeping the order of the rest, until what remains is the same. Return how
    many characters can remain at most."""
    row = [0] * (len(second) + 1)
    for a in first:
        new = [0]
        for j, b in enumerate(second):
            new.append(row[j] + 1 if a == b else max(row[j + 1], new[j]))
        row = new
    return row[-1]


@HARD.problem([(3,), (1,)], [(2,), (4,), (5,), (6,)], lambda r: [(n,) for n in (7, 8, 9, 10, 11, 12)])
def spiral(size: int) -> list[int]:
    """Write the numbers 1, 2, 3 ... into a square of size by size cells along a spiral that starts at the top left,
    goes right, and turns clockwise inwards. Return the diagonal from the top left to the bottom right."""
    square = [[0] * size for _ in range(size)]
    i = j = 0
    di, dj = 0, 1
    for n in range(1, size * size + 1):
        square[i][j] = n
        a, b = i + di, j + dj
        if not (0 <= a < size and 0 <= b < size and square[a][b] == 0):
            di, dj = dj, -di
        i, j = i + di, j + dj
    return [square[k][k] for k in range(size)]


@HARD.problem(
    [([1, 2, 3], 4), ([5], 3)],
    [([2], 0), ([1, 5, 10], 20), ([3, 7], 5)],
    lambda r: [(sorted(set(ints(r, 3, 1, 9))), r.randint(3, 30)) for _ in range(11)],
)
def ways_to_pay(coins: list[int], amount: int) -> int:
    """Distinct positive coins may each be used any number of times. Return in how many ways they make the amount; the
    order of the coins does not matter, and amount 0 has one way."""
    ways = [1] + [0] * amount
    for coin in coins:
        for value in range(coin, amount + 1):
            ways[value] += ways[value - coin]
    return ways[amount]


@HARD.problem(
    [([0, 2, 0, 3],), ([1, 2],)],
    [([],), ([5, 0, 5],), ([3, 2, 1],)],
    lambda r: [(ints(r, n, 0, 6),) for n in range(4, 14)],
)
def puddles(heights: list[int]) -> int:
    """Walls of width 1 and the given heights stand side by side. After heavy rain water stands wherever higher walls on
    both sides hold it. Return how many separate puddles there are: stretches of neighbouring walls under water."""
    count = 0
    wet = False
    for i, h in enumerate(heights):
        now = min(max(heights[: i + 1]), max(heights[i:])) > h
        count += now and not wet
        wet = now
    return count


@HARD.problem(
    [("catsdog", ["cat", "cats", "dog", "sdog"]), ("ab", ["a"])],
    [("", ["x"]), ("aaaa", ["a", "aa"]), ("abc", [])],
    lambda r: [(word(r, n, "ab"), sorted({"a", word(r, 2, "ab"), word(r, 1, "b"), "ba"})) for n in range(3, 13)],
)
def readings(text: str, words: list[str]) -> int:
    """The words are distinct and not empty. Return in how many ways the text can be read as words put together, each as
    often as you like; an empty text has one way."""
    ways = [1] + [0] * len(text)
    for i in range(1, len(text) + 1):
        for w in words:
            if text[:i].endswith(w):
                ways[i] += ways[i - len(w)]
    return ways[-1]


@HARD.problem(
    [([4, 2, 7], 3), ([1], 1)],
    [([], 2), ([5, 5, 5, 5], 2), ([9, 1, 1, 1, 9], 2)],
    lambda r: [(ints(r, n, 1, 12), r.randint(1, 4)) for n in range(3, 13)],
)
def shortest_shift(jobs: list[int], workers: int) -> int:
    """Jobs are in a row and are cut into at most workers stretches of neighbouring jobs, one for each worker. Return
    the smallest possible total of the busiest worker; 0 without jobs."""
    low, high = max(jobs, default=0), sum(jobs)
    while low < high:
        limit = (low + high) // 2
        used, load = 1, 0
        for job in jobs:
            if load + job > limit:
                used, load = used + 1, 0
            load += job
        if used <= workers:
            high = limit
        else:
            low = limit + 1
    return low


@HARD.problem(
    [("abcba", 1), ("abca", 1)],
    [("", 0), ("abc", 0), ("abcdef", 3)],
    lambda r: [(word(r, n, "abc"), r.randint(0, 3)) for n in range(3, 13) for _ in range(2)],
)
def nearly_mirror(text: str, spare: int) -> bool:
    """Return whether the text reads the same backwards after deleting at most spare characters."""
    size = len(text)
    need = [[0] * (size + 1) for _ in range(size + 1)]
    for i in range(size - 1, -1, -1):
        for j in range(i + 1, size):
            need[i][j] = need[i + 1][j - 1] if text[i] == text[j] else 1 + min(need[i + 1][j], need[i][j - 1])
    return size == 0 or need[0][size - 1] <= spare


@HARD.problem(
    [(3, 2), (1, 1)], [(2, 0), (5, 5), (6, 3)], lambda r: [(r.randint(2, 12), r.randint(0, 6)) for _ in range(14)]
)
def quiet_codes(length: int, ones: int) -> int:
    """Return how many texts of the characters 0 and 1 have the given length, exactly ones 1s, and no two 1s side by
    side."""
    end0 = [1] + [0] * ones
    end1 = [0] * (ones + 1)
    for _ in range(length):
        end0, end1 = [a + b for a, b in zip(end0, end1, strict=True)], [0, *end0[:-1]]
    return end0[ones] + end1[ones]
