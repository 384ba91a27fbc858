"""One race per operator."""
