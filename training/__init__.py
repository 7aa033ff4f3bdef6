"""How a model learns: augmentation, schedule, loop, metrics, report."""
