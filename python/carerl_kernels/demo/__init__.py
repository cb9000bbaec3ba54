"""The demonstration: a small language model learns three verifiable domains in sequence, plainly and guarded."""
