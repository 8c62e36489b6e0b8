"""What turns prompts into responses."""
