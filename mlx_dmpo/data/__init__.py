"""From files to ranking examples to prompts. numpy and the standard library only: no mlx here."""
