"""Lightning modules, data and callbacks: training masks and constants on a frozen model."""
