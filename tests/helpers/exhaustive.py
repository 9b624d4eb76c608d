"""Planning by trying everything, in plain Python: what the planner is compared with."""

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


def spent(requests, batch_sizes, seq_lens, cost):
    """What requests, a mapping of (batch, seq_len) to counts, cost in a grid."""
    return sum(
        count * cost(held(batch_sizes, batch), held(seq_lens, seq))
        for (batch, seq), count in requests.items()
    )


def least(requests, batch_candidates, seq_candidates, max_graphs, cost):
    """The least cost of any grid of at most `max_graphs` buckets."""
    return min(
        spent(requests, batches, seqs, cost)
        for batches, seqs in product(ladders(batch_candidates), ladders(seq_candidates))
        if len(batches) * len(seqs) <= max_graphs
    )


def rounded_up(sizes, multiple):
    """The multiples that sizes are rounded up to."""
    return {-(-size // multiple) * multiple for size in sizes}


def waste(requests, cost_of_grid, cost):
    """The part of a grid's cost that is not the requests' own."""
    ideal = sum(count * cost(*size) for size, count in requests.items())
    return 1 - ideal / cost_of_grid if cost_of_grid else 0.0
