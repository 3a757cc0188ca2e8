"""Jobs: their specification, their life as a fold over events, and the services that drive and list them."""
