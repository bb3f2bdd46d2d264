"""The stages of the pipeline (sft, collect, discriminator, ril) and what they share: state, checkpoints, metrics."""
