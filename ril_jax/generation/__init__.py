"""The offline job that collects a teacher's responses, and what is done with them before training.

The job's folder and its loop, the two ways to get responses (the engine in this process, an endpoint), the summary,
and the selection of questions. Nothing here knows of training.
"""
