"""From files to ranking examples to prompts. numpy, arrow and the standard library only: no mlx here."""
