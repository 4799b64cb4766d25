"""What every training stage needs: images, batches, the loop, the run directory."""
