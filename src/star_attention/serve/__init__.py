"""`star-attention serve`: an engine over HTTP, in the shapes that OpenAI's clients speak.

`settings` has what can be set, `engine` the thread that owns the model, `http/` what clients see,
`contexts/` what is kept, and `program` puts them together.
"""
