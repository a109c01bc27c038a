"""The OpenAI API for language models. Source: platform.openai.com/docs/api-reference; docs/reference/openai.md."""
