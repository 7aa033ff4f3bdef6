"""How a model learns: data, augmentation, schedule, loop, metrics, report."""
