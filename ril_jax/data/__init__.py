"""From what a user brings to arrays: records, images, chat and tokens, the grain pipeline, the synthetic default.

Host side only: numpy and Pillow, no JAX arrays and nothing that trains or samples.
"""
