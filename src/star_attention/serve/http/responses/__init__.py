"""`/v1/responses`: OpenAI's protocol for answers that are kept and continued."""
