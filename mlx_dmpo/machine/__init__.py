"""The machine that a run uses: files, directories, memory, ranks, interrupts, console"""
