"""What an answer's text is made of: reasoning, content and tool calls, told apart as it comes."""
