"""Where labelled images come from: sources, splits, decoding, storage, samples. It knows nothing of training."""
