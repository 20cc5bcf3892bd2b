/* Every driver, in the order of their steps. */
#include "driver.h"

extern struct driver rng_driver, blk_driver, echo_driver, net_driver, vsock_driver, balloon_driver, pvpanic_driver;
extern struct driver plug_driver, hostile_driver;

struct driver *const drivers[] = {
    &rng_driver,     &blk_driver,     &echo_driver, &net_driver,     &vsock_driver,
    &balloon_driver, &pvpanic_driver, &plug_driver, &hostile_driver, NULL,
};
