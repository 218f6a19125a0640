"""What is written for OpenAI's and Anthropic's servers, by its base URL alone: see __main__.py."""
