"""Text, conversations and preference pairs as token ids."""
