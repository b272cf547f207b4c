"""A trained model as a file that runs without this toolkit, compared with the model before it is kept."""
