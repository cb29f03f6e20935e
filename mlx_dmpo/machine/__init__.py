"""The machine a run lives on: files, directories, memory, ranks, interrupts, console"""
