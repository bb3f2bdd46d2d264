"""What the networks compute: layers, decoders, vision towers, and the table that maps parameters to HF names.

Knows arrays and configurations only; nothing of data, tokenizers, sampling or training.
"""
