"""What a response is worth: the discriminator, the judge, rule-based checks, and users' own functions."""
