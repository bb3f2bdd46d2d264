"""Compiling every program of a config for TPUs that are not there, and what it tells of memory and time."""
