"""The engine's HTTP face, in OpenAI's form: requests and their checks, prompts, the engine's news as answers, metrics.

Nothing here samples; nothing outside knows of HTTP.
"""
