"""Messages, their encoding and their framing: pure, shared by broker, shell and command line."""
