"""Planning by trying everything, in plain Python: what the planner is compared with."""

import math
from itertools import combinations, product


def ladders(candidates):
    """All ladders of some candidates that hold the largest one."""
    *lower, top = sorted(candidates)
    for size in range(len(lower) + 1):
        for chosen in combinations(lower, size):
            yield (*chosen, top)


def held(ladder, size):
    """The smallest size of a ladder that holds `size`."""
    return min(step for step in ladder if step >= size)


def spent(requests, *ladders_and_cost):
    """What requests, a mapping of sizes to counts, cost in a grid of a ladder for each axis."""
    *grid, cost = ladders_and_cost
    return sum(count * cost(*map(held, grid, sizes)) for sizes, count in requests.items())


def least(requests, *candidates_limit_and_cost):
    """The least cost of any grid of at most so many buckets, from the candidates of each axis."""
    *candidates, max_graphs, cost = candidates_limit_and_cost
    return min(spent(requests, *grid, cost) for grid in grids(*candidates, max_graphs=max_graphs))


def grids(*candidates, max_graphs):
    """All grids of at most so many buckets that hold the largest candidate of each axis."""
    for grid in product(*map(ladders, candidates)):
        if math.prod(map(len, grid)) <= max_graphs:
            yield grid


def padding(requests, *grid):
    """The largest part of its bucket that is padding for any request."""
    return max(1 - math.prod(sizes) / math.prod(map(held, grid, sizes)) for sizes in requests)


def rounded_up(sizes, multiple):
    """The multiples that sizes are rounded up to."""
    return {-(-size // multiple) * multiple for size in sizes}


def waste(requests, cost_of_grid, cost):
    """The part of a grid's cost that is not the requests' own."""
    ideal = sum(count * cost(*size) for size, count in requests.items())
    return 1 - ideal / cost_of_grid if cost_of_grid else 0.0
