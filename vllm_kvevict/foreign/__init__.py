"""What others choose and write: their values in our messages, their code among ours."""
