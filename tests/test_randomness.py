"""Random numbers that depend on the seed and on where in a run they are drawn, and on nothing else."""

import torch

from training.randomness import derive, order_generator, seed_dropout, step_generator


def draw(generator):
    return torch.rand(4, generator=generator).tolist()


def test_the_same_step_draws_the_same_whatever_was_drawn_before():
    before = draw(step_generator(3, 1, 7))
    draw(order_generator(3, 1))
    assert draw(step_generator(3, 1, 7)) == before


def test_every_seed_epoch_step_and_process_draws_something_else():
    where = [(), (0,), (1,), (0, 0), (0, 1), (1, 0), (0, 0, 0), (0, 0, 1), (0, 1, 0)]
    seeds = [derive(seed, *place) for seed in (-1, 0, 1, 2**32) for place in where]
    assert len({seed % 2**32 for seed in seeds}) == len(seeds)  # a Mersenne Twister takes 32 bits of it
    assert draw(order_generator(0, 1)) != draw(step_generator(0, 1, 0))


def test_dropout_draws_the_same_in_the_same_step_of_the_same_process():
    with torch.random.fork_rng():
        seed_dropout(0, 2, 5, 0)
        first = torch.rand(4).tolist()
        seed_dropout(0, 2, 5, 1)
        assert torch.rand(4).tolist() != first
        seed_dropout(0, 2, 5, 0)
        assert torch.rand(4).tolist() == first
